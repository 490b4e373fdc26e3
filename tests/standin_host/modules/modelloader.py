"""Makes one object of every direct subclass of Upscaler; whatever goes wrong there ends the host."""

from modules import shared
from modules.upscaler import Upscaler, UpscalerLanczos, UpscalerNone


def load_upscalers():
    newest = {}
    for cls in reversed(Upscaler.__subclasses__()):
        newest.setdefault(str(cls), cls)
    data = []
    for cls in reversed(newest.values()):
        flag = f"{cls.__name__.lower().replace('upscaler', '')}_models_path"
        path = getattr(shared.cmd_opts, flag, None)
        scaler = cls(path)
        scaler.user_path = path
        scaler.model_download_path = path or scaler.model_path
        data += scaler.scalers
    first = (UpscalerNone, UpscalerLanczos)
    shared.sd_upscalers = sorted(data, key=lambda x: "" if isinstance(x.scaler, first) else x.name.lower())
