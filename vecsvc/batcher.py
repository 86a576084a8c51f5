"""Gathers waiting texts into one run of the encoder.

The seam to encoders is `encoders/base.py`: an `Encoder` has `run(tokens)`, one run of its model over a batch that is
chosen here. A `StepEncoder` brings a `Stepper` besides, and its texts join and leave the running batch between
steps. In both cases queues, lanes, deadlines, cancellations, errors and delivery are this module's, so a scheduler of
cells is a plain object that one thread uses: `room`, `join`, `drop`, `step`, `len`.
"""
