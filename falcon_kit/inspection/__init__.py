"""What a Falcon does with a text: its tokens, what its heads look at, how a prediction comes about."""
