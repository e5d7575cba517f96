"""`explain`: the view of a text on its way through Falcon, as a widget and as a page without a kernel."""

import html
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anywidget

from falcon_kit.display.errors import printable, require
from falcon_kit.display.page import DOM_SCRIPT, WIDGET_STYLE, HasPage, Page, percent, static_text, text_html
from falcon_kit.display.tables import counted
from falcon_kit.explanation.parts import Part, head_part, layer_part, layer_part_bytes, text_part, text_part_bytes
from falcon_kit.explanation.record import Record, record
from falcon_kit.explanation.route import route
from falcon_kit.inspection.hooks import TextOrIds, check_index, check_indices, inspect_model, language_head
from falcon_kit.inspection.probabilities import check_attention_implementation

_SCRIPTS = ("drawing.js", "layer.js", "heads.js", "prediction.js", "flow.js", "tour.js", "explanation.js")
_PAGE_BYTES = 1_400_000
_KEPT_LAYERS = 2  # records of layers that are kept for the current text
_SOURCE = "\n".join([DOM_SCRIPT, *(static_text(__file__, name) for name in _SCRIPTS)])


class Explanation(HasPage, anywidget.AnyWidget):
    """A text on its way through a Falcon, from its tokens to the next one. In Jupyter it is an interactive view.

    `.take(id)` appends a token. `.to_html(path)` writes a page that needs neither a kernel nor a network.
    """

    _esm = _SOURCE + "\nexport default { render };\n"
    _css = WIDGET_STYLE + static_text(__file__, "explanation.css")

    def __init__(self, falcon: Any, text: TextOrIds, layer: int, head: int) -> None:
        self._inspected = inspect_model(falcon)
        language_head(self._inspected)  # raises for a model without one
        check_attention_implementation(self._inspected)
        self.ids: list[int] = self._inspected.encode(text)
        """The token ids of the text so far."""
        spec = self._inspected.spec
        self.layer, self.head = check_index(layer, spec.layers, "layer"), check_index(head, spec.query_heads, "head")
        """What is shown first."""
        self._records: dict[int, Record] = {}
        self._lock = threading.RLock()  # JupyterLab's messages arrive in another thread than that of the cells
        super().__init__()
        self.on_msg(self._on_message)

    def __repr__(self) -> str:
        return f"Explanation({printable(self._inspected.spec.name)}, {counted(len(self.ids), 'token')})"

    @property
    def text(self) -> str:
        return str(self._inspected.tokenizer.decode(self.ids))

    def take(self, token_id: int) -> None:
        """Appends a token to the text. Raises ValueError for an unknown one, or if the context is full."""
        with self._lock:
            before = self.ids
            self.ids = self._inspected.encode([*before, token_id])
            self._records.clear()
            try:
                start = self._start()
            except BaseException:  # Ctrl-C too
                self.ids = before
                self._records.clear()
                raise
            self.send({"type": "start", **start})

    def page(self, layers: int | Iterable[int] | None = None) -> Page:
        """The view without a kernel, at the last token. layers: those that it holds, by default as many as fit.

        A page has at most 1.4 MB: of the 40B, whose layers have 128 heads, one layer of a text of about 40 tokens.
        Raises ValueError, before the model runs, if the layers take more.
        """
        return self._page(layers, has_route=True)

    def _page(self, layers: int | Iterable[int] | None, has_route: bool) -> Page:
        """The page, with the route of the prediction, which takes a forward pass of its own, or without it."""
        spec = self._inspected.spec
        nearest_first = sorted(range(spec.layers), key=lambda layer: abs(layer - self.layer))
        chosen = check_indices(nearest_first if layers is None else layers, spec.layers, "layer")
        require(bool(chosen), "a page without a layer shows nothing: give one, or leave layers out")
        chosen = chosen[: self._fitting(1 if layers is None else len(chosen))]
        with self._lock:
            data: dict[str, Any] = {"start": self._start() | {"layer": chosen[0]}}
            data |= {"route": self._route() if has_route else None, "parts": {}}
            for layer in chosen:
                data["parts"] |= self._layer_parts(layer)
            summary = self._summary()
        script = f"{_SOURCE}\nrender({{ model: storedModel(data), el: root }});"
        return Page("", summary, style=self._css, script=script, data=data)

    def _fitting(self, wanted: int) -> int:
        """The number of layers that fit into a page. Raises ValueError if there are fewer than `wanted`."""
        fixed = len(_SOURCE) + len(self._css) + text_part_bytes(self._inspected, self.ids)
        one = layer_part_bytes(self._inspected.spec, len(self.ids))
        fitting = max(0, _PAGE_BYTES - fixed) // one
        fewer = "fewer layers, or " if fitting else ""
        require(
            fitting >= wanted,
            f"a page of {counted(wanted, 'layer')} takes {(fixed + wanted * one) / 1e6:.1f} MB, the limit is "
            f"{_PAGE_BYTES / 1e6:.1f}: give {fewer}a shorter text",
        )
        return fitting

    def to_html(self, path: str | os.PathLike[str], layers: int | Iterable[int] | None = None) -> Path:
        """Writes the view to a file that needs no kernel and no network, and returns its path. layers: as in `page`."""
        return self.page(layers).write(path)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The widget, and the page of one layer for a notebook without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle:
            bundle[0]["text/html"] = self._repr_html_()
        return bundle

    def _repr_html_(self) -> str:
        try:
            return self._page([self.layer], has_route=False)._repr_html_()
        except ValueError:  # a long text: the page would be too large
            return self._summary()

    def _layer_parts(self, layer: int) -> dict[str, Part]:
        """The parts of a layer and of all its heads at the last position, by the requests that the browser makes."""
        position, heads = len(self.ids) - 1, range(self._inspected.spec.query_heads)
        parts = {f"layer {layer} {position}": self._layer(layer, position)}
        return parts | {f"head {layer} {position} {head} ": self._head(layer, position, head) for head in heads}

    def _summary(self) -> str:
        """The next tokens as plain HTML, for a page without JavaScript."""
        probabilities = self._record(self.layer).logits.softmax(-1)
        best = probabilities.topk(min(5, len(probabilities)))
        texts = self._inspected.token_texts(best.indices.tolist())
        rows = "".join(
            f"<li>{text_html(text, spaces=True)}: {percent(probability)}</li>"
            for text, probability in zip(texts, best.values.tolist(), strict=True)
        )
        name = html.escape(self._inspected.spec.name)
        return f'<div class="fk-summary"><p>{name} continues {text_html(self.text)} with</p><ol>{rows}</ol></div>'

    # What the browser asks for

    def _on_message(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        """Answers a request; an error is shown in the view."""
        key = message.pop("key", None)
        try:
            with self._lock:
                self._commands()[message.pop("do")](key, **message)
        except Exception as error:  # noqa: BLE001  # nobody would see an error in a callback
            known = isinstance(error, ValueError | IndexError)
            self.send(
                {"type": "error", "key": key, "text": str(error) if known else f"{type(error).__name__}: {error}"}
            )

    def _commands(self) -> dict[str, Callable[..., None]]:
        return {
            "hello": lambda key: self.send({"type": "start", "key": key, **self._start()}),
            "take": lambda _, id: self.take(id),
            "layer": lambda key, **what: self._answer(key, self._layer(**what)),
            "head": lambda key, **what: self._answer(key, self._head(**what)),
            "route": lambda key: self._answer(key, self._route()),
        }

    def _answer(self, key: str, part: Any) -> None:
        """Sends a part with the number of tokens of its text: the view asks again for one of the text before."""
        self.send({"type": "part", "key": key, "part": part, "tokens": len(self.ids)})

    def _start(self) -> Part:
        found = self._record(self.layer)
        text = text_part(self._inspected, self.ids, found.logits)
        return {"text": text, "layer": self.layer, "head": self.head}

    def _layer(self, layer: int, position: int) -> Part:
        return layer_part(self._record(layer).layer, check_index(position, len(self.ids), "position"))

    def _head(self, layer: int, position: int, head: int, attended: int | None = None) -> Part:
        check_index(position, len(self.ids), "position")
        head = check_index(head, self._inspected.spec.query_heads, "head")
        if attended is not None:
            check_index(attended, position + 1, "key")
        return head_part(self._record(layer).layer, position, head, attended)

    def _route(self) -> list[Part]:
        return [vars(step) for step in route(self._inspected, self.ids)]

    def _record(self, layer: int) -> Record:
        """The record of a layer for the current text; the last two are kept."""
        layer = check_index(layer, self._inspected.spec.layers, "layer")
        if layer not in self._records:
            known = next(iter(self._records.values()), None)
            while len(self._records) >= _KEPT_LAYERS:
                self._records.pop(next(iter(self._records)))
            self._records[layer] = record(self._inspected, self.ids, layer, known)
        return self._records[layer]


def explain(falcon: Any, text: TextOrIds, *, layer: int = 0, head: int = 0) -> Explanation:
    """A text on its way through Falcon to the next token, as an interactive view in which every number is the model's.

    falcon: what `fk.load` returned, or (model, tokenizer). text: a text or token ids. layer, head: shown first; the
    view reaches all others. A large model computes only what is looked at: one forward pass records one layer. The view
    keeps what it recorded: call `explain` again after a change of the model, such as another adapter.
    Raises ValueError for an empty text or one longer than the context, IndexError for a layer or head out of range.
    """
    return Explanation(falcon, text, layer, head)
