"""What was trained, as it is deployed: codes and scales, packed models, files for the programs that run them.

weights       `quantized`: each weight's codes and scales, which everything else here is made of
packed_model  `quantize`: a plain model with its weights packed in memory
content       all that is exported of a model
layout        what a layout is; layouts/ has them, one a file
exporting     `export`
loading       `load`
verifying     `verify`
writing       files that are there whole or not at all
manifest      what describes an exported folder
"""
