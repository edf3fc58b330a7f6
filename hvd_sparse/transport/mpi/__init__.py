"""The exchange over MPI: agreement first, then data, and never a hang.

| where | what |
|---|---|
| `exchange` | START HERE: what the path calls, and how a step goes on |
| `buckets` | the same, for steps whose buckets leave one by one |
| `protocol` | what ranks say to each other in a step |
| `agreement` | what they must have alike, and who is to blame |
| `buffers` | how payloads and dense tensors lie in memory |
| `failure` | the deadline, and how a failing rank leaves |
| `broadcast` | arrays of one rank to all |
| `measurement` | what an exchange costs in this job |
| `communicator` | mpi4py, and whatever else can carry a step |
"""
