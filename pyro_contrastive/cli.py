"""The command ``pyro-contrastive``: fit, report, embed, list, demo."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from pyro_contrastive import __version__
from pyro_contrastive._fit_settings import check_precision
from pyro_contrastive.checkpoint import CheckpointError, fitted_weights, load_checkpoint
from pyro_contrastive.choices import DATA, EVIDENCES, GUIDES, METHODS
from pyro_contrastive.distributed import BatchShare, process_group, process_rank
from pyro_contrastive.encoding import Precision, check_encoding
from pyro_contrastive.fit import fit, pick_device
from pyro_contrastive.registry import Run, RunConfig

__all__ = ["main"]

OK, FAILED, USAGE = 0, 1, 2

DESCRIPTION = (
    "Contrastive learning as Bayesian inference: fit a posterior over a point on the sphere, and check its width."
)
EXAMPLES = """examples:
  pyro-contrastive demo --out runs/demo
      three seeds on handwritten digits and one artificial world, with a report, in three to nine minutes on two cores
  pyro-contrastive fit --method mcinfonce --data sphere --out runs/sphere
  pyro-contrastive report runs/sphere
      fit and judge one method; the same `fit` again goes on where it stopped
  pyro-contrastive fit --method rpm --data digits --dim 8 --steps 3000 --out runs/rpm
  pyro-contrastive embed runs/digits FOLDER --out embeddings --format parquet
      posteriors of all images below a folder; the same again goes on where it stopped
  pyro-contrastive list
      what can be chosen

a run's folder holds config.json, checkpoint.pt, history.json; `report` adds report.html, posterior.nc (ArviZ), *.png
and summary.json. Exit codes: 0 done, 1 the run failed (or, with `report --strict`, a check), 2 wrong use."""


class UsageError(Exception):
    """A wrong argument, found after parsing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        Exit code: 0 done, 1 the run failed, 2 wrong use.
    """
    try:
        args = _parser().parse_args(argv)
        args.argv = sys.argv[1:] if argv is None else list(argv)
    except SystemExit as error:  # argparse has printed help or the reason
        return error.code if isinstance(error.code, int) else USAGE
    try:
        with process_group():
            return args.command(args)
    except UsageError as error:
        print(f"pyro-contrastive {args.name}: error: {error}", file=sys.stderr)
        return USAGE
    except (CheckpointError, OSError) as error:
        print(f"pyro-contrastive {args.name}: failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"pyro-contrastive {args.name}: interrupted", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pyro-contrastive", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=form
    )
    parser.add_argument("--version", action="version", version=f"pyro-contrastive {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="name")

    sub = commands.add_parser("fit", help="fit one method to one kind of data", epilog=EXAMPLES, formatter_class=form)
    sub.add_argument("--method", required=True, choices=METHODS, help="see `list`")
    sub.add_argument("--data", required=True, choices=DATA, help="see `list`")
    sub.add_argument("--guide", choices=GUIDES, help="family of the posterior (default: suits the method)")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the run, made when missing")
    sub.add_argument("--evidence", choices=EVIDENCES, help="of mcinfonce (default: suits data and concentration)")
    sub.add_argument(
        "--concentration", type=float, metavar="KAPPA", help="of the latents of a pair; `inf`: the views share one"
    )
    sub.add_argument("--dim", type=int, metavar="D", help="latent dimension (default: suits the data)")
    sub.add_argument("--lr", type=float, help="learning rate (default: suits the data)")
    sub.add_argument("--batch-size", type=int, default=256, metavar="N", help="pairs per step (default: %(default)s)")
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: suits the data)")
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the training images instead of --steps")
    sub.add_argument("--seed", type=int, default=0, help="of weights, views and training (default: %(default)s)")
    sub.add_argument("--precision", default="float32", choices=get_args(Precision), help="of the encoder")
    sub.add_argument(
        "--chunk-size", type=int, metavar="N", help="items per pass of the encoder: large batches, less memory"
    )
    sub.add_argument(
        "--ema", type=float, metavar="DECAY", help="average the weights, for instance .999, and judge that"
    )
    sub.add_argument(
        "--patience", type=int, metavar="N", help="stop after N validations (50 per run) without a better held-out loss"
    )
    sub.add_argument("--deterministic", action="store_true", help="deterministic algorithms only")
    _common(sub)
    sub.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from a checkpoint in DIR (default: yes)",
    )
    sub.set_defaults(command=_fit)

    sub = commands.add_parser("report", help="judge a fitted run: report.html, posterior.nc, pictures, summary.json")
    sub.add_argument("out", type=Path, metavar="DIR", help="folder of a run or of the demo")
    sub.add_argument(
        "--strict", action="store_true", help="exit code 1 when a check fails (without it a finding is no error)"
    )
    _common(sub)
    sub.set_defaults(command=_report)

    sub = commands.add_parser("embed", help="write the posterior of every image below a folder to the disk")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run on images")
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images, with all folders below it")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the parts go, made when missing")
    sub.add_argument("--format", choices=("zarr", "parquet"), default="zarr", help="default: %(default)s")
    sub.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time (default: %(default)s)")
    sub.add_argument(
        "--part-items", type=int, default=65_536, metavar="N", help="images per part (default: %(default)s)"
    )
    sub.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    sub.add_argument("--skip-unreadable", action="store_true", help="go on after an unreadable image, and list it")
    _common(sub)
    sub.set_defaults(command=_embed)

    sub = commands.add_parser("list", help="list methods, guides, data and evidences, with papers")
    sub.set_defaults(command=_list)

    sub = commands.add_parser("demo", help="fit digits (three seeds) and an artificial world, and write one report")
    sub.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/demo"), help="default: %(default)s")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    sub.add_argument("--small", action="store_true", help="a few steps only: tests the installation, proves nothing")
    _common(sub)
    sub.set_defaults(command=_demo)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def _device(name: str) -> torch.device:
    try:
        return pick_device(name)
    except ValueError as error:
        raise UsageError(error) from error


def _build(config: RunConfig) -> Run:
    try:
        return Run(config)
    except ValueError as error:
        raise UsageError(error) from error


def _fit(args: argparse.Namespace) -> int:
    try:
        given = {field.name: getattr(args, field.name) for field in fields(RunConfig)}
        config = RunConfig(**given)
        if args.epochs is not None:
            if args.data == "sphere":
                raise ValueError("the artificial world has no epochs, every batch is new; use --steps")
            if args.epochs < 1:
                raise ValueError(f"`epochs` must be >= 1, got {args.epochs}")
            config = replace(config, steps=args.epochs * len(_build(config).batches(torch.device("cpu"))))  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(error) from error
    options = {"chunk_size": args.chunk_size, "deterministic": args.deterministic}
    code = _train(config, args.out, _device(args.device), resume=args.resume, quiet=args.quiet, **options)
    if code == OK and not args.quiet and process_rank()[0] == 0:
        print(f"wrote {args.out}/checkpoint.pt; judge it with: pyro-contrastive report {args.out}")
    return code


def _train(
    config: RunConfig,
    out: Path,
    device: torch.device,
    *,
    resume: bool = True,
    quiet: bool = False,
    label: str = "fit",
    **options: Any,
) -> int:
    run = _build(config)
    try:
        check_encoding(options.get("chunk_size"), config.precision)
        check_precision(config.precision, device)
        batches, validation = run.batches(device), run.validation(device)
        batches = BatchShare(batches) if process_rank()[1] > 1 else batches
    except ValueError as error:
        raise UsageError(error) from error
    assert config.lr is not None
    first = process_rank()[0] == 0
    if first and not (resume and (out / "checkpoint.pt").exists()):
        config.save(out)
    result = fit(
        run.model,
        run.guide,
        batches,
        steps=config.steps,
        lr=config.lr,
        seed=config.seed,
        device=device,
        num_views=run.num_views,
        precision=config.precision,  # type: ignore[arg-type]
        ema=config.ema,
        validation=validation,
        out=out,
        resume=resume,
        config=config.as_dict(),
        progress=False if quiet else label,
        **options,
    )
    history = {name: [_plain(value) for value in column] for name, column in result.history.items()}
    if first:
        (out / "history.json").write_text(json.dumps(history) + "\n")
    if result.status != "done":
        print(f"pyro-contrastive: {label}: {result.message}", file=sys.stderr)
        return FAILED
    return OK


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _load(out: Path, device: torch.device) -> Run:
    try:
        config = RunConfig.load(out)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    run = _build(config)
    path = out / "checkpoint.pt"
    try:
        state = load_checkpoint(path, expected_config=config.as_dict())
        run.model.load_state_dict(fitted_weights(state, ema=config.ema is not None)["model"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; fit the run first") from None
    except (KeyError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not fit the run of {out}/config.json: {error}") from error
    if not state.get("done") and state["position"]["step"] < (config.steps or 0):
        print(f"note: {out} stopped after step {state['position']['step']} of {config.steps}", file=sys.stderr)
    run.model.to(device).eval()
    return run


def _report(args: argparse.Namespace) -> int:
    from pyro_contrastive import diagnostics

    device = _device(args.device)
    members = [args.out, *sorted(path.parent for path in args.out.glob("*/config.json"))]
    sections = []
    settings: dict[str, Any] = {"command": shlex.join(["pyro-contrastive", *args.argv]), "device": device}
    for folder in members:
        run = _load(folder, device)
        if not args.quiet:
            print(f"evaluating {folder} ...", flush=True)
        sections.append(run.report(folder, level=diagnostics.checks.FAMILY_LEVEL / len(members)))
        settings[sections[-1].title] = ", ".join(f"{name} {value}" for name, value in run.config.as_dict().items())
    title = f"pyro_contrastive: {args.out.resolve().name}"
    page = diagnostics.write_html(args.out, title, sections, settings=settings)
    summary = diagnostics.write_summary(args.out, sections)
    if not args.quiet:
        print(_table(sections))
        print(diagnostics.opinion_text(sections))
        print(
            f"report:    {page}\nnumbers:   {summary}\nposterior: {args.out}/posterior.nc  (arviz.from_netcdf opens it)"
        )
    failed = any(section.status == "fail" for section in sections)
    return FAILED if failed and getattr(args, "strict", False) else OK


def _embed(args: argparse.Namespace) -> int:
    from pyro_contrastive.embedding import embed

    run = _load(args.run, _device(args.device))
    try:
        batches = run.images(
            args.folder,
            batch_size=args.batch_size,
            num_workers=args.workers,
            unreadable="skip" if args.skip_unreadable else "raise",
        )
        made = embed(
            run.guide,
            batches,
            args.out,
            format=args.format,
            part_items=args.part_items,
            config={
                "run": str(args.run.resolve()),
                "folder": str(args.folder.resolve()),
                "batch_size": args.batch_size,
            },
            progress=not args.quiet,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(error) from error
    if not args.quiet and process_rank()[0] == 0:
        print(f"wrote {made.items} posteriors to {args.out} in {len(made.parts)} parts")
        for name in made.skipped:
            print(f"not readable, left out: {name}", file=sys.stderr)
    return OK


def _table(sections: Sequence[Any]) -> str:
    """Lay out the figures of all sections, one column each, grouped by kind."""
    lines = []
    for kind in dict.fromkeys(section.kind for section in sections):
        group = [section for section in sections if section.kind == kind]
        names = list(dict.fromkeys(name for section in group for name in section.figures))
        width = max(map(len, names)) + 2
        title = group[0].title.removesuffix(f", seed {group[0].seed}")  # the columns name the seeds
        lines += ["", title, " " * width + "".join(f"{f'seed {section.seed}':>12}" for section in group)]
        for name in names:
            cells = (section.figures.get(name, math.nan) for section in group)
            lines.append(
                name.ljust(width) + "".join(f"{'-' if math.isnan(v) else format(v, '.4g'):>12}" for v in cells)
            )
    return "\n".join([*lines, ""])


def _list(args: argparse.Namespace) -> int:
    groups = {
        "methods (--method)": {
            name: f"{method.about}   https://arxiv.org/abs/{method.paper}" for name, method in METHODS.items()
        },
        "guides (--guide)": {name: about for name, (_, about) in GUIDES.items()},
        "data (--data)": {name: entry.about for name, entry in DATA.items()},
        "evidences of mcinfonce (--evidence)": EVIDENCES,
    }
    for title, entries in groups.items():
        print(f"{title}:")
        for name, about in entries.items():
            print(f"  {name:<17} {about}")
    return OK


def _demo(args: argparse.Namespace) -> int:
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"`seeds` must be different and >= 0, got {args.seeds}")
    device = _device(args.device)
    digits_steps, sphere_steps = (20, 20) if args.small else (None, 1_500)
    plan = [
        (
            args.out if position == 0 else args.out / f"seed{seed}",
            RunConfig(data="digits", seed=seed, steps=digits_steps),
        )
        for position, seed in enumerate(args.seeds)
    ]
    plan.append((args.out / "sphere", RunConfig(data="sphere", steps=sphere_steps)))
    for position, (folder, config) in enumerate(plan, 1):
        label = f"{position}/{len(plan)} {config.data}, seed {config.seed}"
        code = _train(config, folder, device, quiet=args.quiet, label=label)
        if code != OK:
            return code
    return _report(args)


if __name__ == "__main__":
    sys.exit(main())
