"""Train: documents and a planned model in; checkpoints, metrics, a plot and a receipt out.

The way through it, each line a module (nothing is imported before it is called):

    check      -> what is wrong with this run, before anything heavy (limits, model_files,
                  output_dir, schedule)
    tokenizer  -> the tokenizer, with the config's tokens in it
    model      -> the weights, in the plan's precision (precision), with an adapter (adapter)
    fit        -> rows (rows, packing, collate), the engine (session, arguments, engine,
                  evaluator, watch), the final model (final)

The engine writes checkpoints that are complete or absent (checkpoint), with states that hold no
code (saved_states, state_files) and hashes of all files (manifest, file_hashes), which resuming
compares (intact, other_checkpoints). It writes one JSON line per log (metrics), one bar (progress),
and stops on a signal (signals); fit adds loss.png (plot) and receipt.json (receipt).
"""
