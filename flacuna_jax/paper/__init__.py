"""The paper's experiment on SmolLM2-135M-Instruct: data, training, evaluation and a page with the results."""
