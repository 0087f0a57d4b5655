"""The likely causes of each finding, each with how to tell it from the others by what is in the report."""

CHANGED = (
    "its weights were restored from another checkpoint or mixed up with another layer's: the loss jumped at the same "
    "step, and `peel-agent compare` with an older checkpoint shows it unchanged there",
    "a script, a merge or a faulty device wrote into it: one matrix stands out far above the others",
    "its parameter group has a larger learning rate or weight decay: the ratio is as high again at the next checkpoint",
)
REGRESSED = (
    "a step with a bad batch or a spike of the gradient hit it: its change is large too",
    "its learning rate is too high: its change stays above 1 at every checkpoint",
    "its neighbours adapted to a fault of another layer: then that layer has a finding of its own",
)
DEAD = (
    "a gain or a matrix was set to zero, by weight decay, a bad restore or pruning: the matrix is named",
    "its activations are off for every token: a bias has run away",
)
DROPPED = (
    "some of its heads or neurons died: its change was large at the step where it dropped",
    "another block took over its work: that block's margin rose meanwhile",
    "the stream grew and drowned what it adds: its share of the stream fell",
)
STALLED = (
    "it was frozen (requires_grad, or left out of the optimizer): its change is exactly 0",
    "its learning rate is far too low: its change is small and not 0",
)
NEVER_TRAINED = (
    "it was left out of the optimizer, or frozen: its change is exactly 0",
    "its learning rate is far too low: its change is small and not 0",
)
FROZEN = ("it is frozen on purpose: nothing to do, this is told once",)
BELOW = (
    "it does nothing yet, or nothing any more: compare its margin at earlier checkpoints",
    "the stream that enters it is drowned by an earlier block: look for a large stream share before it",
    "the model is deeper than it needs to be here: the redundancy matrix says what can be left out",
)
IMPROVABLE = (
    "it is behind the other layers: its headroom is far above theirs",
    "the learning rate is too low or the run is stuck: most layers have headroom while the loss is flat",
)
FLOODING = (
    "its learning rate is too high: its change is far above 1",
    "the scale of its output was changed (a residual scale, a norm gain): one matrix or gain stands out in its change",
)
COLLAPSED = (
    "the learning rate is too high, or the run diverged: the loss rose",
    "the data changed: the loss on the probe rose while the training loss did not",
)
DIVERGED = (
    "the learning rate is too high, or its schedule was restarted: the training loss rose at the same step",
    "the data or the tokens changed: the training loss did not rise, only that of the probe",
    "an earlier fault of one layer is healing: look for its finding at the checkpoints before",
)
GUESSING = (
    "the probe was made with the tokenizer of another model: then the loss stays there while the training's falls",
    "the checkpoint is the first, or the weights of another model: then the loss is that of the training",
)
EARLY = (
    "the run is young: margins grow with training",
    "the probe is not in this model's tokens: then the loss is far above the training's, or above log(vocabulary)",
)
