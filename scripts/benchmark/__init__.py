"""What `scripts/bench` measures, and how.

command     what is measured, as the command line says
zoo         the models, each with a batch, a loss and an optimizer
ways        how a model can be trained: plain, in threads, under DDP, under DistributedModel
training    one model under one way, ready to make steps
crew        the processes that make them
server      what they are forked from
turns       what they are asked to do
trial       all ways of one model, side by side
measured    what was measured, and ratios of it
targets     what it should show, and whether it does
table       as text and as CSV
chart       as a picture
machine     what it was measured on, and the counters of memory and network
loop        what a learner's step costs over the same loop by hand
growth      how cost grows with processes, threads, batch and parameters

What `scripts/predict` predicts, and how.

prediction         the command, its tables and files
prediction_chart   the same as a picture
scaling            the model of a step, and what it assumes
calibration        what it takes, measured here, and how far off it is here
tracing            what processes say to each other in a step
collectives        how many messages and bytes that is, and how long they take
muting             ways that send nothing, so that the rest is measured
speeds             how fast each kind of collective is here
links              what connects ranks
"""
