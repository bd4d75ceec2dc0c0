"""The path of a transaction. These are its steps, in order, and the module to open for each.

    fetch         streaming/worker/partitions.py   which of the fetched records are taken
    decode        streaming/pipeline/decode.py     messages become rows of the table, or rejects
    deduplicate   streaming/pipeline/deduplicate.py  repeats leave the table
    features      streaming/pipeline/screen.py     rows are folded into the state; their features
    screen        streaming/pipeline/screen.py     the screener's score; which rows are suspicious
    escalate      streaming/pipeline/escalate.py   suspicious rows wait for the deep model
    decide        streaming/pipeline/table_kernels.py  a score becomes an action
    encode        streaming/pipeline/encode.py     rows become messages
    send          streaming/pipeline/send.py       messages go to the broker
    acknowledge   streaming/worker/outbox.py       the broker has them: their records count as decided
    commit        streaming/worker/outbox.py       the offsets of the decided records

`streaming/pipeline/table.py` has the table whose columns they fill. `streaming/pipeline/steps.py` calls the steps from
`decode` to `send`, `streaming/worker/loop.py` the others.
"""
