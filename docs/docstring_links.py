"""Links of docstrings: [`Name`], as transformers writes them, leads to the reference where it has the name."""

import re
from typing import Any

import griffe

LINK = re.compile(r"\[(`(\w+)`)\](?![\[(])")


class DocstringLinks(griffe.Extension):
    """Rewrites such links for mkdocstrings; names that are not public are shown as code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = {str(name).strip("'\"") for name in pkg.exports or ()}

        def link(match: re.Match) -> str:
            return f"[{match[1]}][{pkg.name}.{match[2]}]" if match[2] in public else match[1]

        for module in pkg.modules.values():
            self._rewrite(module, link)

    def _rewrite(self, obj: griffe.Object, link: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = LINK.sub(link, obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, link)
