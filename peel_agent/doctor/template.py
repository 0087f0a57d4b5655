"""The commented configuration: every section, every key, and what was found."""

from __future__ import annotations

import json

from peel_agent.doctor.folder import WatchedPlace
from peel_agent.errors import ConfigurationError, printable

HEAD = """\
# The settings of peel-agent, all of them. Behind a `#` stands the default, or an example where there is none: take the
# `#` away and change it. The environment overrides this file (PEEL__WATCH__POLL_SECONDS=5), flags override both.
"""

WATCH_PATH = '# path = "/runs/mine/checkpoints"'
LENGTH = "# sequence_length = 1024"

BODY = """
# What is watched: the directory that one training writes its checkpoints to.
[watch]
# path = "/runs/mine/checkpoints"  # or s3://bucket/run, gs://bucket/run; or on the command line
# format = "auto"          # or the name of one format plug-in, see `peel-agent plugins`
# settle_seconds = 10      # a checkpoint is read once its files have not changed for so long
# poll_seconds = 10        # a timed scan; file system events only make it come sooner
# backlog = "latest"       # of several that wait; or "all" (the default with --once), or "every:N"
# ready_markers = ["STABLE"]  # files that must all be in its folder before a checkpoint counts as whole; none
# keep_free_gb = 50        # GiB that stay free on its disk for the training; by default a tenth of it, at most 50

# How the model is built: by transformers from config.json, or by a function of yours.
[model]
# factory = "auto"         # or "package.module:callable" for a model of your own, see docs/inputs.md
# precision = { "model.layers.*_proj.weight" = "ternary" }  # weights that hold latents: sign, ternary, int4-g128, ...

# What the model is measured on: held-out tokens of the TRAINING distribution, the same for every checkpoint.
[probe]
# path = "heldout.npy"     # token ids (.npy .bin .safetensors) or text (.txt .jsonl .parquet); needed, or --probe
# tokenizer = "tokenizer.json"  # for text, or tokenizer.model; by default the one beside the checkpoint
# text_key = "text"        # the key or column that the text is in
# dtype = "uint16"         # of ids in a .bin: uint16, uint32, int32 or int64; by default what its content shows
# sequence_length = 1024   # by default the smaller of the model's context and 1024; 2-D ids keep theirs
# fit_tokens = 65536       # references are solved on these,
# select_tokens = 8192     # the best of several is chosen on these,
# confirm_tokens = 16384   # and every published number is measured on these

# How much is computed of each checkpoint.
[peel]
# effort = "standard"      # quick: margins of whole blocks; standard: and bounds; full: and headroom, redundancy
# quantities = ["margin", "bounds", "headroom", "redundancy"]  # instead of what the effort says
# maps = "ends"            # target maps of the bounds: direct, ends, paper, or lists such as [[1, 4], [2, 4]]
# solver = "closed_form"   # or descent: the paper's six AdamW steps a block, from the trained one; descent_cold
# budget_passes = 8        # margins and progress of a checkpoint, in plain forward passes; 0 is no limit;
# time_budget_seconds = 600  # a checkpoint; what it does not suffice for is left out, and the report says what

# What a worker may take, so that the training stays first.
[device]
# select = "auto"          # a GPU that nobody uses, else the CPU; or "cpu", "cuda:1", a GPU's uuid
# memory_fraction = 0.5    # of the machine's memory (its cgroup's, in a container), or of the GPU's
# nice = 19                # the worker's niceness

# Where numbers are written.
[tracker]
# use = ["mlflow"]         # any of the tracker plug-ins: mlflow, tensorboard, wandb, jsonl
# training_loss = "train/loss"   # where the training logs its loss, for the rule false_convergence (by default found)
# max_series = 400         # never more metric keys than this
# report = true            # report page and heat maps after each checkpoint, in trackers that show them: mlflow

# The MLflow server, and the run of it.
# [tracker.mlflow]
# tracking_uri = "http://mlflow:5000"  # by default MLFLOW_TRACKING_URI; a secret: "${NAME}" or "file:/path"
# run_id = "..."           # by default MLFLOW_RUN_ID, else the run tagged peel.checkpoint_dir, else a new run
# experiment = "Default"   # by default MLFLOW_EXPERIMENT_NAME, or the one of the id in MLFLOW_EXPERIMENT_ID
# experiment_id = "..."    # instead of its name
# run_name = "..."         # of a new run; by default the directory's name
# end_run = false          # the training is over: a run that was made by peel-agent is ended with each checkpoint
# logged_models = false    # MLflow's logged model of the same step gets the numbers and the verdict too

# A local file instead of a server, with use = ["jsonl"].
# [tracker.jsonl]
# path = "publications.jsonl"  # by default in the run's own state folder

# Files for TensorBoard, with use = ["tensorboard"]; pip install "peel-agent[tensorboard]".
# [tracker.tensorboard]
# log_dir = "/runs/tensorboard"  # what `tensorboard --logdir` is given; by default in the run's own state folder

# Offline runs of W&B, with use = ["wandb"], for `wandb sync` to upload; pip install "peel-agent[wandb]".
# [tracker.wandb]
# project = "peel-agent"   # by default WANDB_PROJECT, else this
# entity = "team"          # by default WANDB_ENTITY, else the one of who uploads
# run_name = "..."         # by default the directory's name
# folder = "/runs/wandb"   # where they are kept; by default in the run's own state folder

# What survives a restart: one folder an agent.
[state]
# path = "/var/lib/peel-agent"  # by default $STATE_DIRECTORY (systemd's), or beneath ~/.local/state/peel-agent

# The agent's own health: /healthz, /readyz and /metrics.
[health]
# listen = "127.0.0.1:9877"  # by default this, where it is free; "" turns it off

# The log, on stderr.
[log]
# format = "text"          # or "json", one object a line
# level = "info"           # or warning, error

# What peels: "local", a child process of the agent, or "ray", a cluster; pip install "peel-agent[ray]".
[engine]
# use = "local"

# A Ray cluster, with use = "ray": what each checkpoint asks of it. [device] select does not count then.
# [engine.ray]
# address = "auto"         # HOST:PORT or ray://HOST:PORT; by default RAY_ADDRESS, or else the cluster of this machine
# num_cpus = 1             # as many threads
# num_gpus = 0             # above 0 and up to 1: peeled on a GPU, and never on the CPU instead
# memory_bytes = 8_000_000_000  # by default none is asked for, and [device] memory_fraction is the limit
# resource = "peel"        # one of this custom resource, to keep to the nodes that have it; by default none
# at_once = 2              # checkpoints that are peeled at a time, of all runs
# retries = 3              # how often one is started again whose node died
# spread = 0               # pieces of one checkpoint that may be with other nodes at a time; 0: none

# Where notices go, beside the trackers: each [[sink]] is one place; all keys but use and name are the plug-in's own.
# A secret is "${NAME}", of the environment, or "file:/path"; also within a list.
# [[sink]]
# use = "stderr"
# journal = false          # each line begins with a priority, as systemd's journal reads it
# journal_stream = "8:1234"  # by default JOURNAL_STREAM, as systemd sets it: our stderr then has priorities too

# [[sink]]
# use = "jsonl"
# name = "for_others"      # by default as `use`
# path = "notices.jsonl"   # by default in the state folder

# [[sink]]
# use = "webhook"          # CloudEvents 1.0, posted as JSON
# url = "https://hooks.example/peel"  # a secret if need be; redirects are not followed
# signing_secret = "${PEEL_HOOK_SECRET}"  # signs each request: X-Peel-Signature, see docs/alerts.md
# token = "${PEEL_HOOK_TOKEN}"  # sent as Authorization: Bearer
# timeout_seconds = 10     # for all of it: name, connection, answer
# allow_private = false    # addresses of private networks and of this machine, and http
# ca_file = "/etc/ssl/own-ca.pem"  # these authorities instead of the system's
# proxy = "http://proxy:3128"  # none without it, whatever the environment says

# [[sink]]
# use = "alertmanager"     # Prometheus's: told again every 2 minutes of what fires, and of its end
# url = "http://127.0.0.1:9093"
# token = "${ALERTMANAGER_TOKEN}"  # where a proxy before it asks for one
# allow_private = true
# timeout_seconds = 10
# ca_file = "/etc/ssl/own-ca.pem"
# proxy = "http://proxy:3128"

# [[sink]]
# use = "slack"            # and what takes the same: Mattermost, Rocket.Chat, Discord's address with /slack behind it
# url = "${SLACK_WEBHOOK}"  # the address that the chat gave you: a secret
# blocks = true            # Slack's own layout beside the plain text
# timeout_seconds = 10
# allow_private = false
# ca_file = "/etc/ssl/own-ca.pem"
# proxy = "http://proxy:3128"

# [[sink]]
# use = "email"
# host = "smtp.example.org"
# port = 587               # by default 587, 465 for "tls", 25 for "none"
# security = "starttls"    # or "tls" from the first byte; "none" only to a private address, and without a password
# user = "peel"
# password = "${SMTP_PASSWORD}"
# sender = "peel@example.org"
# to = ["oncall@example.org"]
# timeout_seconds = 30
# ca_file = "/etc/ssl/own-ca.pem"

# [[sink]]
# use = "apprise"          # pip install "peel-agent[apprise]": over a hundred services
# urls = ["${PUSHOVER_URL}"]  # Apprise's URLs, which hold secrets
# timeout_seconds = 60     # for all of them together

# [[sink]]
# use = "exec"             # a program of yours gets each group as JSON on stdin; status 0 taken, 75 later, else never
# command = ["/usr/local/bin/page", "--team", "training"]  # no shell
# enabled = false          # nothing is run without it
# timeout_seconds = 30     # then it is killed, with all that it started
# path = "/usr/bin:/bin"   # by default PATH, HOME and LANG of the agent; it sees no other variable of ours
# home = "/srv/peel"
# lang = "C.UTF-8"

# Alerts. Without any [[rule]] the first nine are in force; a [[rule]] of your own replaces them all.
# Each names a block or a part of one (model.layers.3/mlp) by what the peel found of it.
# [[rule]]
# name = "layer_below"     # a cheap stand-in is as good as the block, or as its attention or MLP
# kind = "layer_below"
# for_checkpoints = 2      # raise after so many in a row (by default 1 for events, 2 for states),
# clear_checkpoints = 2    # clear after so many in a row
# after_step = 0           # nothing is raised before this step; while most blocks are idle, no layer is accused anyway
# severity = "warning"     # info, warning or critical
# threshold = 0.01         # only when the margin is at most so many nats per token; each kind has its own meaning
# repeat_checkpoints = 20  # while it fires, told again so often (by default never)
# sinks = ["for_others"]   # by name; by default every sink

# [[rule]]
# name = "layer_changed"   # its weights moved unusually since the checkpoint before: an event, one checkpoint is enough
# kind = "layer_changed"

# [[rule]]
# name = "layer_regressed"  # its weights of the checkpoint before would do better
# kind = "layer_regressed"

# [[rule]]
# name = "layer_dropped"   # it earns far less than it did
# kind = "layer_dropped"

# [[rule]]
# name = "layer_stalled"   # it has stopped learning while the others go on
# kind = "layer_stalled"

# [[rule]]
# name = "layer_flooding"  # it drowns the stream, and every later block looks idle because of that
# kind = "layer_flooding"

# [[rule]]
# name = "run_below_bound"   # a cheap model made of the run's own layers beats it by more than 1 % of the loss
# kind = "run_below_bound"

# [[rule]]
# name = "no_checkpoint"   # none came for five times the longest pause so far, or for `threshold` seconds
# kind = "no_checkpoint"

# [[rule]]
# name = "agent_error"     # a trouble that lasts 5 minutes, a checkpoint that cannot be used, a delivery given up
# kind = "agent_error"

# [[rule]]
# name = "lag"             # so many checkpoints wait to be peeled
# kind = "lag"
# threshold = 5

# [[rule]]
# name = "loss_too_high"   # any number of the run in the tracker
# kind = "metric"
# metric = "peel/loss"
# op = ">"                 # <, <=, > or >=
# threshold = 8.0

# [[rule]]
# name = "false_convergence"  # the training loss is flat over 5 checkpoints while something better is proven to be near
# kind = "false_convergence"

# [[rule]]
# name = "quantization_collapse"  # the weight set costs a low-bit layer more than 5 % of the loss; needs headroom
# kind = "quantization_collapse"

# [[rule]]
# name = "layer_improvable"  # a better layer of its kind is proven while the loss is flat; needs [peel] effort = "full"
# kind = "layer_improvable"

# Several runs: each [[run]] lays its own tables over the sections above (watch, model, probe, peel, tracker, rule).
# [[run]]
# name = "second"          # by default the last part of its path
# [run.watch]
# path = "/runs/second/checkpoints"
"""


def configuration_text(watched: WatchedPlace | None = None) -> str:
    """The text of a peel.toml with every key, commented out; what was found of a place stands in it.

    Raises ConfigurationError for a place whose name no TOML file can hold.
    """
    if watched is None:
        return HEAD + BODY
    said = "".join(f"#   {printable(sentence)}\n" for sentence in watched.sentences)
    body = BODY.replace(WATCH_PATH, f"path = {_quoted(watched.place)}", 1)
    length = watched.sequence_length
    if length is not None:
        body = body.replace(LENGTH, f"# sequence_length = {length}", 1)
    return f"{HEAD}#\n# What `peel-agent init` found:\n{said}{body}"


def _quoted(text: str) -> str:
    """A basic string of TOML: as in JSON, which leaves DEL as it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{text} cannot be written to a configuration: its name is not UTF-8",
            remedy="give a link to it of another name, or name it on the command line",
        ) from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
