"""The options that several verbs share, each with its one help text."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

MODEL_HELP = "a zoo name, a .safetensors file of `robustlip train`, an .onnx file, hf:FOLDER, timm:FOLDER, or package.module:callable"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
DataSpec = Annotated[str, typer.Option("--data", help="digits, mnist, cifar10, tiny_shakespeare, a hub name or a file, each with :split")]
ThreatName = Annotated[str, typer.Option("--threat", help="l1, l2, linf, embedding-l2[@positions], weights-spectral, …")]
Clip = Annotated[
    Optional[str],
    typer.Option("--clip", metavar="LOW,HIGH|none", help="input threats: valid range of inputs, for every attack  [default: none]"),
]
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="write JSON to FILE; to stdout for - or no FILE")]
Device = Annotated[Optional[str], typer.Option("--device", help="cpu, cuda, cuda:1, …  [default: the GPU if there is one]")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="samples per batch")]
Limit = Annotated[Optional[int], typer.Option("--limit", min=1, help="maximum number of samples")]
Seed = Annotated[int, typer.Option("--seed", help="seed of the choice of samples and of the attacks' random starts")]
DataDir = Annotated[Optional[str], typer.Option("--data-dir", help="folder of data sets in the hub's parquet layout  [default: $ROBUSTLIP_DATA]")]
Subset = Annotated[Optional[str], typer.Option("--subset", help="the configuration of the data set, if it has several")]
ImageColumn = Annotated[Optional[str], typer.Option("--image-column", help="column of --data  [default: the only one with images]")]
LabelColumn = Annotated[Optional[str], typer.Option("--label-column", help="column of --data  [default: the only one with labels]")]
TextColumn = Annotated[Optional[str], typer.Option("--text-column", help="column of --data with text")]
Context = Annotated[Optional[int], typer.Option("--context", min=1, help="text only: tokens per sample")]
FileBatchSize = Annotated[Optional[int], typer.Option("--batch-size", min=1, help="samples per batch  [default: as in the certificate, or 256]")]
