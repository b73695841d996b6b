"""One module a contender: `train(job, gate)` trains for ever on `job`'s batches and passes the gate after each step."""
