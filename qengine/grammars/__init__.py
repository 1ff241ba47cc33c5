"""Grammars: from a form that an answer must have to the set of tokens that may come next.

sources (what is asked, checked) < library < trial (is it safe to compile?) < compiler (compile, remember). A `state` is
one sequence's way through a grammar.
"""
