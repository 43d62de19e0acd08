"""The Stability tab of TensorBoard: its routes and its page.

May import TensorBoard and werkzeug; never torch, which would add seconds to TensorBoard's start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lit_stability.incidents.log import to_json
from lit_stability.tensorboard.data import NoDataError, StabilityData
from lit_stability.tensorboard.tags import PLUGIN, QUANTITIES

log = logging.getLogger("tensorboard")

MIMETYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""What the page may consist of; ``mimetypes`` asks the machine, which may say anything."""

_ENTRY = 'export * from "./static/index.js";\n'
_STATIC = Path(__file__).parent / "static"

Answer = Callable[[StabilityData, Any], Any]
"""What is asked for, in JSON types, given the data and the arguments of the request."""


class StabilityPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Serves what `lit_stability.tensorboard.tab_writer` has written, and the page that shows it.

    ``runs``; ``steps?run=R``; ``layers?run=R&quantity=Q``; ``incidents?run=R``: JSON, in which NaN
    and Inf are strings. All but the first take ``optimizer=1`` and so on, where there are several.
    What is wrong with a request is answered with ``{"error": ..., "do": ...}``.

    Args:
        context: TensorBoard's ``TBContext``.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        files = (file for file in _STATIC.rglob("*") if file.suffix in MIMETYPES)
        # Only what is in this table is served: no path of a request ever reaches the disk.
        self._files = {file.relative_to(_STATIC).as_posix(): file for file in files}

    def get_plugin_apps(self) -> dict[str, Any]:
        """The routes, relative to the plugin's own."""
        return {
            "/index.js": _serve_entry,
            "/static/*": self._serve_file,
            "/runs": self._app(lambda data, args: data.runs()),
            "/steps": self._app(lambda data, args: data.steps(_run(args), _optimizer(args))),
            "/layers": self._app(
                lambda data, args: data.layers(_run(args), _quantity(args), _optimizer(args))
            ),
            "/incidents": self._app(lambda data, args: data.incidents(_run(args))),
        }

    def is_active(self) -> bool:
        """False, at no cost: TensorBoard first asks its data provider for data of this name."""
        return False

    def frontend_metadata(self) -> Any:
        """The name of the tab and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Stability")

    def _app(self, answer: Answer) -> Any:
        @wrappers.Request.application
        def serve(request: wrappers.Request) -> Any:
            if request.method not in ("GET", "HEAD"):
                return _error(request, 405, f"{request.method} is not served", "use GET")
            environ = request.environ
            where = (plugin_util.context(environ), plugin_util.experiment_id(environ))
            return self._answer(request, answer, StabilityData(self._provider, *where))

        return serve

    @staticmethod
    def _answer(request: wrappers.Request, answer: Answer, data: StabilityData) -> Any:
        try:
            text = to_json(answer(data, request.args))
            return http_util.Respond(request, text, "application/json; charset=utf-8")
        except NoDataError as error:
            advice = "choose one of those in `runs`; a run gets there by a GradientMonitor "
            advice += "and a TensorBoardLogger in its Trainer"
            return _error(request, 404, str(error.args[0]), advice)
        except BadRequestError as error:
            return _error(request, 400, *error.args)
        except Exception as error:
            log.exception("the Stability tab cannot answer %s", request.full_path)
            found = f"the data cannot be read ({type(error).__name__}: {error})"
            return _error(request, 500, found, "reload; if it stays, see TensorBoard's console")

    @wrappers.Request.application  # type: ignore[arg-type]
    def _serve_file(self, request: wrappers.Request) -> Any:
        name = request.path.partition("/static/")[2]
        file = self._files.get(name)
        if file is None:
            return _error(request, 404, f"the page has no file {name!r}", "reinstall lit-stability")
        mimetype = MIMETYPES[PurePosixPath(name).suffix]
        return http_util.Respond(request, file.read_bytes(), mimetype)


class BadRequestError(ValueError):
    """What is wrong with the arguments of a request, and what to do about it."""


@wrappers.Request.application
def _serve_entry(request: wrappers.Request) -> Any:
    """The module that TensorBoard asks for, where all of the page can be below one folder."""
    return http_util.Respond(request, _ENTRY, "text/javascript")


def _run(args: Any) -> str:
    if "run" not in args:
        raise BadRequestError("the argument run is missing", "add ?run= and a name of `runs`")
    return str(args["run"])


def _quantity(args: Any) -> str:
    value = args.get("quantity")
    if value not in QUANTITIES:
        said = "the argument quantity is missing" if value is None else f"quantity is {value!r}"
        raise BadRequestError(said, f"ask for quantity={' or '.join(QUANTITIES)}")
    return str(value)


def _optimizer(args: Any) -> int:
    value = args.get("optimizer", "0")
    if not (value.isascii() and value.isdigit() and len(value) < 4):
        raise BadRequestError(f"optimizer is {value!r}", "ask for its index: 0, 1, ...")
    return int(value)


def _error(request: wrappers.Request, code: int, error: str, do: str) -> Any:
    text = to_json({"error": error, "do": do})
    return http_util.Respond(request, text, "application/json; charset=utf-8", code=code)
