import gradio as gr


class InputAccordion(gr.Checkbox):
    """A check box that is also the accordion around what it switches."""

    def __init__(self, value, label="Accordion", **kwargs):
        super().__init__(value=value, label=label, **kwargs)
