"""Docstrings as transformers writes them, for mkdocstrings: links like [`Name`], types like (`int`, *optional*)."""

import re
from typing import Any

import griffe

LINK = re.compile(r"\[(`(\w+)`)\](?![\[(])")
TYPE = re.compile(r"^( *\w[\w, ]* )\((`.*?)\):", flags=re.MULTILINE)


class TransformersDocstrings(griffe.Extension):
    """Leads links to the reference, or shows them as code where a name is not public; takes the marks out of types."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = {str(name).strip("'\"") for name in pkg.exports or ()}

        def link(match: re.Match) -> str:
            return f"[{match[1]}][{pkg.name}.{match[2]}]" if match[2] in public else match[1]

        for module in pkg.modules.values():
            self._rewrite(module, link)

    def _rewrite(self, obj: griffe.Object, link: Any) -> None:
        if obj.docstring is not None:
            text = LINK.sub(link, obj.docstring.value)
            obj.docstring.value = TYPE.sub(lambda match: f"{match[1]}({re.sub('[`*]', '', match[2])}):", text)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, link)
