"""What the help says of the training screen."""

HELP = """
## Training
**New run** is the form; its first field chooses what is trained: draft heads (medusa), the model
itself on answers (sft), or on every token (pt). A field that is empty has the default that stands
in it; what is wrong is told below the field. **Run** shows the open run, **Runs** those of before.

The model's own answers teach its heads best: name prompts under *Self-distillation*,
`generate`, and the model answers them first.

## The charts
- **loss per head**: how surprised each head is by the true token; lower is better. Head 1
  guesses the token after next, head 2 the one after that. *base* is the model's own,
  where it learns.
- **top-1 accuracy**: how often a head's likeliest token is the true one. A step of the chat
  accepts head 2's guess only where head 1's was right.
- **tokens/s**: of all ranks. **memory**: of rank 0's process, or of its device at its peak.

A point is a step; of a run that was not watched from here, the mean of `log_interval` steps.

## Processes
A run is a process of its own beside the chat's engine; both share the machine. It ends, with
a checkpoint, when the workbench ends, unless you leave it running on quitting. Then open it
again from its folder. Heads of a finished run go into the chat with **Use heads**, which can
measure what they bring.
"""
