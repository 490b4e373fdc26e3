"""As much of gradio as building a page of components takes: they keep their arguments."""


class Block:
    def __init__(self, *args, **kwargs):
        self.value = kwargs.get("value", args[0] if args else None)
        self.label = kwargs.get("label", "")
        self.__dict__.update(kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Blocks(Block):
    pass


class Row(Block):
    pass


class Checkbox(Block):
    pass


class Number(Block):
    pass


class Slider(Block):
    pass


class Dropdown(Block):
    pass


class Radio(Block):
    pass


class Textbox(Block):
    pass
