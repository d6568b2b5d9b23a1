"""Alignment of a small LM to a target LLM.

The way of a run, file by file: ``settings`` -> ``texts`` (``examples``, ``guidance``, ``text_cache``, ``packing``) ->
``model`` (``surprisals``, ``attention``, ``hardware``) -> ``trainer`` (``objectives``, ``callbacks``, ``fitting``) ->
``report`` (``held_out``). ``alignment`` walks it, ``align`` is the command, ``run_folder`` what stays on disk, and
``publish`` (``verify``, ``card``, ``provenance``) makes a checkpoint of it.
"""
