"""Small operations between the matmuls of a decoder layer, each one launch, with their specification in `reference`.

They read what a matmul leaves behind, be it a result or the partial sums of a split, and store their rows in the order
that the next matmul wants, so that neither a sum nor an activation order costs a launch of its own.
"""
