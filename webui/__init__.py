"""The Gradio page and the /sdapi/v1 service: one process, one job queue.

Where things are: `jobs` is the queue, `backend` the jobs that make pictures, `models` what is loaded, `library` what
was made; `service` and `page` stand on these and know nothing of each other; `access` and `incoming` guard both;
`server` joins them.
How a picture is made is decided in `diptych.pipelines` and `diptych.upscalers`, never here.
"""
