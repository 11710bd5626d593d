"""Train: documents and a planned model in; checkpoints, metrics, a plot and a receipt out.

The way through it, each line a module (nothing is imported before it is called):

    run        -> the steps of a run, from its config to the final model
    check      -> what is wrong with this run, before anything heavy (output_dir, resume)
    tokenizer  -> the tokenizer, with the config's tokens in it
    data       -> documents of tokens with labels
    model      -> the weights (base_model, quantized), with an adapter (lora)
    fit        -> rows (rows, packing), the engine (session, arguments, engine, loss), the saved
                  model (saved_model), loss.png (metrics) and receipt.json (receipt)

The engine writes checkpoints that are complete or absent (checkpoint), with states that hold no
code (saved_states) and hashes of all files, which resuming compares (intact). It writes one JSON
line per log (metrics), one bar (session), and stops on a signal (distributed).
"""
