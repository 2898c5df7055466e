"""The flags of `xrai serve` for its DICOM side. This module imports no DICOM package."""

from xrai.command import Flag

DICOM_FLAGS = (
    Flag("dicom_port", 0, "port of the DICOM node, such as 11112; 0: no node", type=int),
    Flag(
        "dicom_host",
        "127.0.0.1",
        "address that the node listens on; others than this machine's own need --dicom_allow or "
        "--dicom_cert",
    ),
    Flag("dicom_aet", "XRAI", "AE title of the node, which senders must call"),
    Flag("dicom_allow", "", "AE titles that may send, joined by commas; empty: any"),
    Flag("dicom_cert", "", "PEM file of the node's certificate; with --dicom_key: TLS alone"),
    Flag("dicom_key", "", "PEM file of its key"),
    Flag("dicom_client_ca", "", "PEM file; senders must show a certificate that it signed"),
    Flag("dicom_max_mib", 256, "size of an object, at most, MiB", type=int),
    Flag("dicom_associations", 8, "associations at a time, at most", type=int),
    Flag(
        "pacs",
        "",
        "archive that results go to: HOST:PORT:AET, or the https:// address of a DICOMweb service, "
        "with a token in XRAI_PACS_TOKEN; empty: none",
    ),
    Flag("pacs_tls", False, "encrypt C-STORE to the archive", type=bool),
    Flag("pacs_ca", "", "PEM file of what signed the archive's certificate; empty: the system's"),
    Flag("result", "sr", "what is sent: sr (structured report), sc (heat map) or both"),
    Flag("outbox", "", "folder in which results wait until the archive has them"),
    Flag("outbox_days", 7.0, "days after which a result that waits is given up", type=float),
)
