"""See it think: a page on which an Eso-LM writes, in any order, and says how probable texts are.

python examples/app.py --model outputs/quickstart          # or a name on the Hub
make app MODEL=outputs/quickstart

`make space MODEL=...` leaves a folder in build/space that can be pushed as a Space.
"""

import itertools
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import torch
from app_view import COLORINGS, STYLE, bound, legend, show_counts, show_scores, show_step
from holes import HOLE, fill_in_masks
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

with suppress(ImportError):  # a saved model has its code with it
    import eso_lm  # noqa: F401

SIDES = ("A", "B")
ORDERS = ("automatic", "random", "strided", "left_to_right")
MAX_ORDERS, MAX_PLANS, MAX_LENGTH_TO_SCORE = 8, 64, 256
MAX_DIGITS, LARGEST_SEED = 9, 2**53 - 1  # which a browser can still count
MAX_VISITORS = 200  # who watch at a time
WAITING = "waits for its turn"
SPACE_MODEL = Path(__file__).with_name("model")
DEFAULT_MODEL = os.environ.get("MODEL") or (str(SPACE_MODEL) if SPACE_MODEL.is_dir() else "outputs/quickstart")


@dataclass
class Arguments:
    """Which model, and where the page is."""

    model: str = field(default=DEFAULT_MODEL, metadata={"help": "name or folder of the Eso-LM"})
    host: str | None = field(default=None, metadata={"help": "unset: this machine alone, or as a Space says"})
    port: int | None = field(default=None, metadata={"help": "unset: the first free one from 7860"})
    share: bool = field(default=False, metadata={"help": "lend the page an address of Gradio's"})


@dataclass
class Settings:
    """Of one of the two texts."""

    alpha_0: float
    num_steps: int
    order: str
    block_length: int
    temperature: float
    lossless: bool

    def for_generate(self) -> dict[str, Any]:
        """The arguments of `generate`; what is 0 or "automatic" is left to it."""
        return {
            "alpha_0": self.alpha_0,
            "num_diffusion_steps": int(self.num_steps) or None,
            "unmasking_order": None if self.order == "automatic" else self.order,
            "block_length": int(self.block_length) or None,
            "temperature": self.temperature,
            "lossless": self.lossless,
        }


@dataclass
class Writing:
    """A text as it was after every forward, in the view of one visitor."""

    steps: list = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    state: str = ""


class StepQueue(BaseStreamer):
    """A streamer that hands every step on to another thread, with the time that it came."""

    def __init__(self) -> None:
        self.steps: queue.Queue = queue.Queue()
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The text comes with the steps."""

    def put_step(self, step: Any) -> None:
        self.steps.put((step, time.perf_counter() - self.started))

    def end(self) -> None:
        """The thread says when it is done."""


class App:
    """What the page can do, with one model for all visitors. Each has their own texts, and a button to cancel.

    Args:
        model: An Eso-LM.
        tokenizer: Its tokenizer, with a mask.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = model.config.max_position_embeddings
        self.turn = threading.Lock()  # who computes
        self.numbers = itertools.count()
        self.runs: dict[str, tuple[int, threading.Event]] = {}  # of each visitor the last, and whether it is cancelled

    # Write.

    def begin(self, request: gr.Request) -> tuple:
        """Takes note that a visitor wants to write, at once: what they were writing ends, and there is time to cancel.

        Returns:
            The number of the run, and what the page says meanwhile.
        """
        visitor, run = str(request.session_hash), next(self.numbers)
        self.cancel(request)
        self.runs[visitor] = (run, threading.Event())
        waiting = [show_state(WAITING), ""]
        return run, *waiting, gr.Slider(interactive=False)

    def write(
        self,
        request: gr.Request,
        run: int,
        prompt: str,
        new_tokens: int,
        seed: int,
        pause: float,
        both: bool,
        *settings: Any,
    ) -> Iterator[tuple]:
        """Writes one text, or two with the same seed, and shows them after every forward, for `pause` seconds."""
        sides = [Settings(*settings[:6]), Settings(*settings[6:])][: 1 + both]
        new_tokens = whole("number of new tokens", new_tokens, self.context)
        ids, seed = self.encode(prompt or "", new_tokens), whole("seed", seed, LARGEST_SEED)
        number, cancelled = self.runs.get(str(request.session_hash), (None, threading.Event()))
        if number != run:
            return  # the visitor has begun another
        writings = [Writing() for _ in sides]
        for writing, side in zip(writings, sides, strict=True):
            for _ in self.steps_of(writing, ids, new_tokens, seed, side, cancelled, one_by_one=pause > 0):
                yield self.view(writings, is_done=False)
                cancelled.wait(pause)
            if cancelled.is_set():
                break
        yield self.view(writings, is_done=True)

    def encode(self, prompt: str, new_tokens: int) -> torch.Tensor:
        """The ids of a prompt, (1, tokens), with masks at its holes.

        Raises:
            gr.Error: for one that is too long, and where there is nothing to write.
        """
        holes = HOLE.findall(prompt)
        masks = sum(int(size[:MAX_DIGITS]) for size in holes)
        if masks > self.context or any(len(size) > MAX_DIGITS for size in holes):
            raise failure(f"The holes of the prompt have more tokens than the model's context, {self.context}.")
        ids = self.ids_of(fill_in_masks(prompt, self.tokenizer.mask_token))
        if ids.shape[1] + new_tokens > self.context:
            raise failure(
                f"The prompt has {ids.shape[1]} tokens, and {new_tokens} are to follow: together at most "
                f"{self.context}, the model's context."
            )
        if new_tokens == 0 and not (ids == self.tokenizer.mask_token_id).any():
            raise failure("There is nothing to write: ask for new tokens, or leave a hole, <mask:5>, in the prompt.")
        return ids

    def ids_of(self, text: str) -> torch.Tensor:
        """The ids of a text, (1, tokens).

        Raises:
            gr.Error: where a hole seems to be meant and is not written as one.
        """
        if re.search("<mask", text, re.IGNORECASE):
            raise failure("A hole is written <mask:5>, for five tokens; only the prompt of a text may have some.")
        text = text.encode("utf-8", "replace").decode()  # halves of surrogates
        return self.tokenizer(text, return_tensors="pt")["input_ids"].long().view(1, -1)

    def steps_of(
        self,
        writing: Writing,
        ids: torch.Tensor,
        new_tokens: int,
        seed: int,
        side: Settings,
        cancelled: threading.Event,
        one_by_one: bool,
    ) -> Iterator[None]:
        """Has `generate` write in a thread of its own, and comes back whenever there is more to be seen.

        Unless steps are to be shown one by one, some are passed over: a page cannot be drawn as often as a small model
        steps. A text that is cancelled stays as it is shown, however far `generate` is ahead of that.
        """
        streamer, failures = StepQueue(), []

        def stops(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), cancelled.is_set())

        def run() -> None:
            try:
                with self.turn:
                    streamer.started = time.perf_counter()
                    if not cancelled.is_set():
                        self.model.generate(
                            ids if ids.shape[1] else None,
                            max_new_tokens=new_tokens,
                            generator=torch.Generator().manual_seed(seed),
                            streamer=streamer,
                            stopping_criteria=[stops],
                            **side.for_generate(),
                        )
            except Exception as error:
                failures.append(error)
            finally:
                streamer.steps.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        writing.state = WAITING
        is_done = False
        try:
            while not is_done and not cancelled.is_set():
                try:
                    arrived = [streamer.steps.get(timeout=0.1)]
                except queue.Empty:
                    if not writing.steps:
                        yield  # waits, and can be cancelled
                    continue
                while not one_by_one and not streamer.steps.empty():
                    arrived.append(streamer.steps.get())
                is_done = arrived[-1] is None
                for step, seconds in filter(None, arrived):
                    writing.steps.append(step)
                    writing.seconds.append(seconds)
                    writing.state = "writes"
                if not is_done:
                    yield
        finally:
            if not is_done:
                cancelled.set()  # the visitor has cancelled, or gone
        if failures:
            raise failure(str(failures[0]))
        writing.state = "cancelled" if cancelled.is_set() else ""

    def view(self, writings: list[Writing], is_done: bool) -> tuple:
        """The components of the tab: both texts, what is kept of them, and the slider through their steps."""
        last = max(max(len(writing.steps) for writing in writings) - 1, 0)
        slider = gr.Slider(maximum=max(last, 1), value=last, interactive=is_done and last > 0)
        return *self.texts(writings, last), writings, slider

    def texts(self, writings: list[Writing] | None, at: int) -> list[str]:
        """The texts of both sides after forward number `at`, or their last."""
        shown = []
        for writing in writings or []:
            if not writing.steps:
                shown.append(show_state(writing.state))
                continue
            index = min(max(int(at), 0), len(writing.steps) - 1)
            is_last = index == len(writing.steps) - 1
            step, state = writing.steps[index], writing.state if is_last else "looking back"
            counts = show_counts(step, writing.seconds[index], self.tokenizer.mask_token_id, state)
            shown.append(counts + show_step(step, self.tokenizer))
        return shown + [""] * (len(SIDES) - len(shown))

    def cancel(self, request: gr.Request) -> None:
        """Stops what this visitor has begun."""
        _, event = self.runs.get(str(request.session_hash), (None, None))
        if event is not None:
            event.set()

    def leave(self, request: gr.Request) -> None:
        """Forgets a visitor who has closed the page."""
        self.cancel(request)
        self.runs.pop(str(request.session_hash), None)

    # Score and compare.

    def text_to_score(self, text: str) -> torch.Tensor:
        """The ids of a text, (1, tokens).

        Raises:
            gr.Error: for an empty one, one that is too long, and one with holes.
        """
        ids, limit = self.ids_of(text or ""), min(self.context, MAX_LENGTH_TO_SCORE)
        if not 1 <= ids.shape[1] <= limit:
            raise failure(f"The text has {ids.shape[1]} tokens: 1 to {limit} can be scored here.")
        if (ids == self.tokenizer.mask_token_id).any():
            raise failure("Only text without holes has a likelihood.")
        return ids

    def score(self, text: str, alpha_0: float, num_orders: int, seed: int) -> tuple[str, pd.DataFrame]:
        """The text under some orders, and the bound of its log-likelihood that they give together."""
        ids, orders = self.text_to_score(text), whole("number of orders", num_orders, MAX_ORDERS)
        generator = torch.Generator().manual_seed(whole("seed", seed, LARGEST_SEED))
        with self.turn:
            found = self.model.log_likelihood(ids, num_orders=orders, alpha_0=alpha_0, generator=generator)
        parts = []
        for number, (log_probs, order) in enumerate(zip(found.token_log_probs[0], found.orders[0], strict=True), 1):
            ranks = (order.argsort() + 1).tolist()
            shown = show_scores(ids[0].tolist(), log_probs.tolist(), ranks, self.tokenizer)
            parts.append(f"<div><b>Order {number}</b>{shown}</div>")
        bounds = [-value for value in bound(found.log_likelihood_per_order[0])]
        table = pd.DataFrame({"orders": [str(number + 1) for number in range(orders)], "nats": bounds})
        return '<div class="orders">' + "".join(parts) + "</div>", table

    def compare(self, text: str, alpha_0: float, num_plans: int, seed: int) -> pd.DataFrame:
        """Exact nats per token of a text under samplers of few and many forwards, strided and random."""
        ids, rows = self.text_to_score(text), []
        plans, seed = whole("number of plans", num_plans, MAX_PLANS), whole("seed", seed, LARGEST_SEED)
        budgets = [2**power for power in range(ids.shape[1].bit_length())]
        with self.turn:
            for order in ("strided", "random"):
                for steps in budgets:
                    found = self.model.log_likelihood(
                        ids,
                        num_orders=plans,
                        alpha_0=alpha_0,
                        generator=torch.Generator().manual_seed(seed),
                        num_diffusion_steps=steps,
                        unmasking_order=order,
                    )
                    forwards = found.num_function_evaluations.float().mean().item()
                    nats = -found.log_likelihood.item() / ids.shape[1]
                    rows.append({"forwards": forwards, "nats per token": nats, "order": order})
        return pd.DataFrame(rows)

    # The page.

    def build(self) -> gr.Blocks:
        """The page, to be launched."""
        with gr.Blocks(title="Eso-LM", analytics_enabled=False) as page:
            gr.Markdown(
                "# Eso-LM\nA diffusion language model that writes several tokens at a time, in any order, and knows "
                "exactly how probable they are."
            )
            with gr.Tab("Write"):
                self._build_write()
            with gr.Tab("Score"):
                self._build_score()
            with gr.Tab("Compare"):
                self._build_compare()
            page.unload(self.leave)
        # Who computes is settled by `turn`; to watch what is there already keeps nobody waiting.
        return page.queue(default_concurrency_limit=None)

    def _build_write(self) -> None:
        prompt = gr.Textbox(
            "If <mask:4> is not found, <mask:6> is raised.",
            label="Prompt",
            info="Holes are written <mask:5>, for five tokens. Empty: from nothing.",
            lines=2,
            elem_id="prompt",
        )
        with gr.Row():
            new_tokens = gr.Slider(
                0, self.context, min(32, self.context // 2), step=1, label="New tokens", elem_id="new-tokens"
            )
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed", min_width=80)
            pause = gr.Slider(0, 1, 0.1, step=0.05, label="Pause", info="seconds for which a forward is shown")
            coloring = gr.Radio(COLORINGS, value="forward", label="Color of a token", elem_id="coloring")
            both = gr.Checkbox(False, label="Two settings", info="side by side", elem_id="both", min_width=120)
        settings, columns, texts = [], [], []
        with gr.Row():
            for side, num_steps, lossless in zip(SIDES, (8, 0), (False, True), strict=True):
                with gr.Column(visible=side == "A", elem_id=f"settings-{side}") as column:
                    settings += self._build_settings(side, num_steps, lossless)
                columns.append(column)
        with gr.Row():
            start = gr.Button("Write", variant="primary", elem_id="write")
            cancel = gr.Button("Cancel", elem_id="cancel")
        with gr.Row(elem_id="texts"):
            for side in SIDES:
                with gr.Column(visible=side == "A") as column:
                    texts.append(gr.HTML(elem_id=f"text-{side}"))
                columns.append(column)
        at = gr.Slider(
            0, 1, 0, step=1, label="Back through the forwards", interactive=False, elem_id="steps", buttons=[]
        )
        key = gr.HTML(legend("forward"))
        kept, run = gr.State(), gr.State()
        both.change(lambda on: [gr.Column(visible=on)] * 2, both, columns[1::2], queue=False, api_visibility="private")
        inputs = [run, prompt, new_tokens, seed, pause, both, *settings]
        quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        begun = gr.on([start.click, prompt.submit], self.begin, None, [run, *texts, at], queue=False, **quietly)
        written = begun.then(self.write, inputs, [*texts, kept, at], trigger_mode="multiple", **quietly)
        written.failure(lambda: ("", ""), None, texts, queue=False, **quietly)
        cancel.click(self.cancel, queue=False, **quietly)
        at.input(self.texts, [kept, at], texts, **quietly)
        coloring.change(legend, coloring, key, **quietly)

    def _build_settings(self, side: str, num_steps: int, lossless: bool) -> list:
        with gr.Accordion(f"Settings {side}"):
            with gr.Row():
                alpha_0 = gr.Slider(0, 1, 1.0, step=0.05, label="alpha_0", info="share written in parallel")
                steps = gr.Slider(0, self.context, num_steps, step=1, label="Steps", info="0: as many as tokens")
                block = gr.Slider(0, self.context, 0, step=1, label="Block length", info="0: one block")
            with gr.Row():
                order = gr.Dropdown(ORDERS, label="Order", value=ORDERS[0], min_width=160)
                temperature = gr.Slider(0.1, 2, 1.0, step=0.05, label="Temperature", min_width=120)
                exact = gr.Checkbox(lossless, label="Lossless", info="drafts, judged", min_width=120)
        return [alpha_0, steps, order, block, temperature, exact]

    def _build_score(self) -> None:
        text = gr.Textbox("Return the size of the file in bytes.", label="Text", lines=2, elem_id="score-text")
        with gr.Row():
            alpha_0 = gr.Slider(0, 1, self.model.config.alpha_0, step=0.05, label="alpha_0")
            orders = gr.Slider(1, MAX_ORDERS, 4, step=1, label="Orders")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        start = gr.Button("Score", variant="primary", elem_id="score")
        shown = gr.HTML(elem_id="scores")
        gr.HTML(legend("probability"))
        plot = gr.LinePlot(
            x="orders",
            y="nats",
            title="Of the text, by its first orders: in expectation a bound from above, which tightens with them",
        )
        # What stands there is of another text.
        start.click(lambda: ("", None), None, [shown, plot], queue=False, api_visibility="private").then(
            self.score, [text, alpha_0, orders, seed], [shown, plot], api_name="score"
        )

    def _build_compare(self) -> None:
        text = gr.Textbox("Return the size of the file in bytes.", label="Text", lines=2, elem_id="compare-text")
        with gr.Row():
            alpha_0 = gr.Slider(0, 1, 1.0, step=0.05, label="alpha_0")
            plans = gr.Slider(1, MAX_PLANS, 16, step=1, label="Plans", info="of each; more tighten the bound")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        plot = gr.LinePlot(
            x="forwards",
            y="nats per token",
            color="order",
            title="The likelihood of the text under samplers",
            caption="Up to as many steps as tokens. Steps that draw none cost no forward.",
        )
        start.click(lambda: None, None, plot, queue=False, api_visibility="private").then(
            self.compare, [text, alpha_0, plans, seed], plot, api_name="compare"
        )


def whole(name: str, value: Any, high: int) -> int:
    """A number that a visitor has typed.

    Raises:
        gr.Error: unless it is a whole one from 0 to `high`.
    """
    if not isinstance(value, int | float) or value != value or not 0 <= value <= high or value != int(value):
        raise failure(f"The {name} must be a whole number from 0 to {high}.")
    return int(value)


def failure(message: str) -> gr.Error:
    """An error that the visitor is shown, as HTML."""
    return gr.Error(escape(message, quote=False))


def show_state(state: str) -> str:
    """What the page says in place of a text."""
    return f'<div class="counts"><i>{state}</i></div>'


def load(name: str) -> App:
    """The page's model and tokenizer, from a folder or the Hub.

    Raises:
        ValueError: when there is none of this name.
    """
    try:
        model = AutoModel.from_pretrained(name, trust_remote_code=True)
        return App(model, AutoTokenizer.from_pretrained(name, trust_remote_code=True))
    except OSError as error:
        raise ValueError(f"`model` must be the folder of an Eso-LM, or its name on the Hub, got {name!r}.") from error


def main(arguments: Arguments) -> None:
    page = load(arguments.model).build()
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        css=STYLE,
        max_threads=MAX_VISITORS,
    )


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
