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
from lit_stability.tensorboard.data import DamagedDataError, NoDataError, StabilityData
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
"""File types of the page. ``mimetypes`` is not used: its answers depend on the machine."""

_ENTRY = 'export * from "./static/index.js";\n'
_STATIC = Path(__file__).parent / "static"

Answer = Callable[[StabilityData, Any], Any]
"""Returns the requested data as JSON types, from the data and the request's arguments."""


class StabilityPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Serves the data that `lit_stability.tensorboard.tab_writer` wrote, and the page.

    The routes ``runs``, ``steps?run=R``, ``layers?run=R&quantity=Q``, ``incidents?run=R`` and
    ``verdict?run=R`` return JSON in which NaN and Inf are strings. ``steps`` and ``layers`` accept
    ``optimizer=1`` and so on if there are several. Invalid requests are answered with
    ``{"error": ..., "do": ...}``.

    Args:
        context: TensorBoard's ``TBContext``.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        files = (file for file in _STATIC.rglob("*") if file.suffix in MIMETYPES)
        # Only files in this table are served, so no path from a request reaches the disk.
        self._files = {file.relative_to(_STATIC).as_posix(): file for file in files}

    def get_plugin_apps(self) -> dict[str, Any]:
        """Returns the handlers by route, relative to the plugin's own route."""
        return {
            "/index.js": _serve_entry,
            "/static/*": self._serve_file,
            "/runs": self._app(lambda data, args: data.runs()),
            "/steps": self._app(lambda data, args: data.steps(_run(args), _optimizer(args))),
            "/layers": self._app(
                lambda data, args: data.layers(_run(args), _quantity(args), _optimizer(args))
            ),
            "/incidents": self._app(lambda data, args: data.incidents(_run(args))),
            "/verdict": self._app(lambda data, args: data.verdict(_run(args))),
        }

    def is_active(self) -> bool:
        """Returns False at no cost: TensorBoard first asks its data provider for data itself."""
        return False

    def frontend_metadata(self) -> Any:
        """Returns the name of the tab and the path of its JavaScript module."""
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
            advice = "choose a run from `runs`; a run is listed if its Trainer has a "
            advice += "GradientMonitor and a TensorBoardLogger"
            return _error(request, 404, str(error.args[0]), advice)
        except BadRequestError as error:
            return _error(request, 400, *error.args)
        except DamagedDataError as error:
            advice = "choose another run: only this one is affected; its event file was cut, "
            advice += "edited, or written by another program"
            return _error(request, 422, str(error), advice)
        except Exception as error:
            log.exception("the Stability tab cannot answer %s", request.full_path)
            problem = f"the data cannot be read ({type(error).__name__}: {error})"
            advice = "reload; if the error persists, see TensorBoard's console"
            return _error(request, 500, problem, advice)

    @wrappers.Request.application  # type: ignore[arg-type]
    def _serve_file(self, request: wrappers.Request) -> Any:
        name = request.path.partition("/static/")[2]
        file = self._files.get(name)
        if file is None:
            return _error(request, 404, f"the page has no file {name!r}", "reinstall lit-stability")
        mimetype = MIMETYPES[PurePosixPath(name).suffix]
        return http_util.Respond(request, file.read_bytes(), mimetype)


class BadRequestError(ValueError):
    """Raised for invalid request arguments; holds the problem and what to do about it."""


@wrappers.Request.application
def _serve_entry(request: wrappers.Request) -> Any:
    """Serves the module that TensorBoard requests; the page itself is below ``static``."""
    return http_util.Respond(request, _ENTRY, "text/javascript")


def _run(args: Any) -> str:
    if "run" not in args:
        raise BadRequestError("the argument run is missing", "add ?run=NAME, a name from `runs`")
    return str(args["run"])


def _quantity(args: Any) -> str:
    value = args.get("quantity")
    if value not in QUANTITIES:
        problem = "the argument quantity is missing" if value is None else f"quantity is {value!r}"
        raise BadRequestError(problem, f"use quantity={' or '.join(QUANTITIES)}")
    return str(value)


def _optimizer(args: Any) -> int:
    value = args.get("optimizer", "0")
    if not (value.isascii() and value.isdigit() and len(value) < 4):
        raise BadRequestError(f"optimizer is {value!r}", "give its index: 0, 1, ...")
    return int(value)


def _error(request: wrappers.Request, code: int, error: str, do: str) -> Any:
    text = to_json({"error": error, "do": do})
    return http_util.Respond(request, text, "application/json; charset=utf-8", code=code)
