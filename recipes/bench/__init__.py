"""`flashbias bench`: attention with a bias beside its peers, on the workloads that the project is judged by."""
