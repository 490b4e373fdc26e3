"""The axes of the X/Y/Z plot; extensions append theirs."""


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.choices, self.confirm = label, type, apply, choices, confirm


axis_options = [AxisOption("Seed", int, lambda p, x, xs: setattr(p, "seed", x))]


from modules import scripts  # noqa: E402


class Script(scripts.Script):
    def title(self):
        return "X/Y/Z plot"
