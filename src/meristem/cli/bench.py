"""``meristem bench``"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.options import JSON, given_actor, names, show, table

if TYPE_CHECKING:
    from meristem.bench.session import Request
    from meristem.workspace import Workspace

app = typer.Typer(
    name="bench", help="Methods against each other on continual-learning streams.", no_args_is_help=True
)

CONFIG = "meristem.yaml"
METRICS = ("acc", "bwt", "fwt", "forgetting")
WORKSPACE = """\
schema: meristem/workspace/v1
evaluation: {{dtype: bfloat16, device: {device}, batch_tokens: 4096}}
"""

Out = Annotated[Path, typer.Option(help="The benchmark's folder: a workspace with results beside it.")]


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """The protocols: tasks, orders, stage."""
    from meristem.bench.protocols import PROTOCOLS

    document = {
        p.name: {
            "about": p.about,
            "stage": p.stage,
            "tasks": {t.name: {"folder": t.folder, "hub": t.hub and t.hub.name} for t in p.tasks},
            "orders": p.orders,
            "words": p.words,
            "recipe": p.recipe,
        }
        for p in PROTOCOLS.values()
    }
    rows = [(p.name, p.stage, len(p.tasks), ", ".join(p.orders), p.about) for p in PROTOCOLS.values()]
    show(as_json, document, table("protocols", ("protocol", "stage", "tasks", "orders", "about"), rows))


@app.command("run")
def run(
    protocol: str,
    out: Out,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[:key=value,...], several joined by +; or sequential, per-task, joint. May be repeated.",
            show_default="sequential",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with one folder per task's data set.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or NAME=hf:ORG/NAME: where one task lies instead.")
    ] = None,
    orders: Annotated[str | None, typer.Option(help="e.g. 1,2 or all", show_default="the first")] = None,
    seeds: Annotated[str, typer.Option(help="e.g. 0,1,2")] = "0",
    train: Annotated[int, typer.Option(min=1, help="Training rows per task.")] = 100,
    test: Annotated[int, typer.Option(min=1, help="Test items per task.")] = 100,
    model: Annotated[str, typer.Option(help="`embedded`, hf:ORG/NAME[@REVISION] or a folder.")] = "embedded",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps per task.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Epochs per task, instead of steps.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file: overrides the protocol's.")] = None,
    words: Annotated[
        int | None,
        typer.Option(min=0, help="Cut texts to so many words; 0: never.", show_default="protocol's"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps.")] = "cpu",
    dev: Annotated[
        bool, typer.Option("--dev", help="Measure on items drawn from the training rows: to choose settings.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    as_json: JSON = False,
) -> None:
    """Train and measure methods x orders x seeds; what has a result is not done again."""
    from meristem.bench.session import Request

    request = Request(
        protocol=protocol,
        methods=tuple(method or ["sequential"]),
        data=data,
        tasks=tuple(task or ()),
        orders=tuple(names(orders)),
        seeds=tuple(names(seeds)),
        train=train,
        test=test,
        model=model,
        steps=steps,
        epochs=epochs,
        recipe=recipe,
        words=words,
        device=device,
        development=dev,
    )
    if dry_run:
        _plan(request, out, as_json)
    else:
        _run(request, out, as_json)


def _run(request: Request, out: Path, as_json: bool) -> None:
    from meristem.bench import session

    checked = session.check(request)
    materials = session.prepare(checked, out)
    rows, documents = [], []
    with _workspace(out, request.device) as ws:
        done = session.execute(checked, materials, out, ws.store, ws.actor, ws.evaluator(), ws.progress)
        for run, result, cached in done:
            documents.append({"name": run.name, "cached": cached, **{k: result[k] for k in METRICS}})
            rows.append((run.name, *(_number(result[k]) for k in METRICS), "cached" if cached else ""))
    show(as_json, documents, table("runs", ("run", *METRICS, ""), rows))


def _plan(request: Request, out: Path, as_json: bool) -> None:
    """What would run; nothing is written where the results go."""
    import tempfile

    from meristem.bench import results, session

    checked = session.check(request)
    content, evaluation = None, checked.evaluation
    if (out / CONFIG).exists():
        with _workspace(out, request.device) as ws:
            content, evaluation = session.base_content(ws.store, request.model), ws.config.evaluation
    with tempfile.TemporaryDirectory() as folder:
        materials = session.prepare(checked, Path(folder))
    planned = session.runs(checked, materials, content, evaluation)
    found = [(run, results.find(out, run) is not None) for run in planned]
    documents = [{"name": run.name, "cached": cached, "tasks": run.tasks} for run, cached in found]
    rows = [(run.name, " ".join(run.tasks), "cached" if cached else "to do") for run, cached in found]
    show(as_json, documents, table("runs", ("run", "tasks", ""), rows))


@contextmanager
def _workspace(out: Path, device: str) -> Iterator[Workspace]:
    """The workspace in ``out``, made there if there is none."""
    from meristem.cli.progress import bars
    from meristem.store.packs import write_file_durably
    from meristem.workspace import Workspace

    if not (out / CONFIG).exists():
        write_file_durably(out / CONFIG, WORKSPACE.format(device=device).encode())
    begun = (
        out / ".meristem" / "meristem.db"
    ).exists()  # by a call that may have been cut off after the file
    with bars() as progress:
        ws = (Workspace.open if begun else Workspace.create)(out, actor=given_actor(), progress=progress)
        try:
            yield ws
        finally:
            ws.close()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A benchmark's folder.")],
    to: Annotated[Path | None, typer.Option(help="Where to write it.", show_default="DIR/report")] = None,
    as_json: JSON = False,
) -> None:
    """Tables, curves, matrices and the stability-plasticity plane, beside published numbers."""
    from meristem.bench.report import write_report

    markdown, page = write_report(folder, to)
    show(as_json, {"markdown": str(markdown), "html": str(page)}, f"{markdown}\n{page}")
