"""What a training run with an injection will take, before it starts: `drift_fast.plan`.

`counts` reads how large two models are, `training` how they are to be trained; `memory`, `hours`
and `motion` do the arithmetic, `rates` holds what was measured and where; `planning` puts it
together, `report` shows it, `command` is `drift-fast plan`. Nothing here reads a weight or trains.
"""
