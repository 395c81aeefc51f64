from configs.xielu_1b import *  # noqa: F403

activation = "swiglu"
