"""The paper end to end: students distilled and trained with INT4 weights, judged by what the INT4 kernel answers."""
