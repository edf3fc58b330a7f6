"""Who carries bytes between ranks.

`mpi` has the protocol of a step, over MPI or whatever else is a
`contract.Communicator`: `process_group` is one of torch.distributed, `loopback` one
inside a process.
"""
