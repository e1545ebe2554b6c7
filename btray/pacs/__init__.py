"""A PACS over DICOMweb (PS3.18): its address and client, and its archive as an input of the jobs on archives."""
