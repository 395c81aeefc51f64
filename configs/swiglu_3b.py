from configs.xielu_3b import *  # noqa: F403

activation = "swiglu"
