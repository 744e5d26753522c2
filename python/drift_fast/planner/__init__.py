"""What a training run with an injection will take, before it starts: `drift_fast.plan`.

`counts` reads how large two models are; `training` and `options` say how they train, and
`configuration` reads that from a file. `memory`, `hours`, `motion` and `figures` do the arithmetic,
with the measured rates of `rates`. `planning` puts it together, `remedies` finds what would fit,
`report` shows it. Nothing here reads a weight or trains.
"""
