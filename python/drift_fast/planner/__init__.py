"""What a training run with an injection will take, before it starts: `drift_fast.plan`.

`counts` reads how large the two models are. `training` and `options` describe the run;
`configuration` reads it from a file. `memory`, `hours`, `motion` and `figures` compute, with the
measured rates in `rates`. `planning` combines them, `remedies` finds what would fit, `report` shows
it. Nothing here reads weights or trains.
"""
