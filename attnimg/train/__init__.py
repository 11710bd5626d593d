"""Train a model as planned on documents; write checkpoints, metrics, a plot and a receipt.

The modules, in the order in which a run uses them (each is imported only when it is needed):

    run         -> the steps of a run, from its config to the final model
    check       -> raises for what would fail (environment, model_files, base_model), and finds the
                   checkpoint to resume from (intact, resume)
    tokenizer   -> the tokenizer, with the config's tokens added
    data        -> documents of tokens with labels
    model       -> the weights, quantized if the config asks for it, with an adapter (lora)
    fit         -> rows, the engine, the final model (model_files), the receipt (records)
    engine      -> TRL's trainer with our arguments, loss, checks and checkpoints (arguments, loss,
                   own_loss, attention_check, saved_states, checkpoint, records)

distributed coordinates several processes; pickled_weights converts pickled weights to safetensors.
"""
