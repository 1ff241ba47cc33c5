"""The server under load: against the engine alone, against llama.cpp's server, and beyond what it can carry.

    servers    the server on one core, and readings of the CPU time it takes
    reference  the same requests without HTTP, on the same core in turns
    load       who sends: this process, on the other core
    parts      what is measured: one function per part, plain figures out
    overload   the long part, with its chart
    report     figures against targets

Invariant: what is measured and what measures never share a core, unless there is only one; then the record says so.
"""
