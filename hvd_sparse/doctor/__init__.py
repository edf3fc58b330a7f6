"""`python -m hvd_sparse.doctor`: what is installed, and will sparsification pay here?

installed.py   what is installed and built
transport.py   the collectives of this job, whoever started it
network.py     what they take on this network
local.py       what choosing and writing back takes on this machine
model.py       the tensors of the model in question
traffic.py     what each of these costs on the wire, without a job: --plan
prediction.py  what a step's exchange will take, dense and sparse; the verdict
report.py      all of it as text
"""
