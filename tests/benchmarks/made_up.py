"""Records made up for tests of what is drawn from them."""

import math

from benchmarks.records import Point, Record, Spec


def record(
    method="adam",
    seed=0,
    train=(3.0, 2.0, 1.0),
    *,
    test=None,
    metric=None,
    problem="digits-cnn",
    status="finished",
    **more,
):
    """A run of ten steps between evaluations, a tenth of a second each."""
    settings = more.pop("settings", {})
    budget = more.pop("budget", {"epochs": 5})
    pace = more.pop("pace", 0.1)
    test = test or train
    metric = metric or [math.nan] * len(train)
    points = tuple(
        Point(step=10 * place, seconds=10 * pace * place, train=a, test=b, metric=c)
        for place, (a, b, c) in enumerate(zip(train, test, metric, strict=True))
    )
    parts = {"forward and backward": 0.75 * points[-1].seconds, "statistics": 0.25 * points[-1].seconds}
    content = {
        "step_seconds": pace,
        "parts": parts,
        "memory": 1000,
        "peak": 10**8,
        "note": "",
        "environment": {"device": "cpu", "threads": 1},
    }
    wanted = {name: more.pop(name) for name in ("purpose", "schedule") if name in more}
    spec = Spec(problem=problem, method=method, settings=settings, seed=seed, **budget, **wanted)
    return Record(spec=spec, status=status, points=points, **{**content, **more})


def diverged(method="adam", seed=0, **more):
    """A run that was lost at once."""
    return record(method, seed, (3.0, math.nan), status="diverged", **more)
