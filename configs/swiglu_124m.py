from configs.xielu_124m import *  # noqa: F403

activation = "swiglu"
