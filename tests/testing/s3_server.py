"""moto's S3 on the loopback with one bucket, for tests of clients.

    s3_server.py BUCKET

Prints `endpoint http://127.0.0.1:PORT` once it listens. moto looks at no signatures; here a request whose
signature or whose body's digest is not what botocore makes of it is answered with 403 and the reason. Two
pages of its own, which need no signature: /_boto3/KEY is the object as boto3 reads it, /_uploads the number
of uploads in parts that have not ended. The object `by/boto3` is there from the start.
"""

import hashlib
import io
import logging
import os
import sys
import threading

ACCESS_KEY, SECRET_KEY, TOKEN, REGION = "test-key", "test/secret+key", "test-token", "eu-test-1"
os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = ACCESS_KEY, SECRET_KEY
os.environ["AWS_SESSION_TOKEN"] = TOKEN

import boto3  # noqa: E402
from botocore.auth import S3SigV4Auth  # noqa: E402
from botocore.awsrequest import AWSRequest  # noqa: E402
from botocore.credentials import Credentials  # noqa: E402
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402
from werkzeug.wrappers import Request, Response  # noqa: E402


def fault_of(request, body):
    """Why a request is not to be believed, or nothing."""
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    if scheme != "AWS4-HMAC-SHA256":
        return "no signature"
    claims = dict(part.strip().split("=", 1) for part in rest.split(","))
    names = claims["SignedHeaders"].split(";")
    for needed in ("host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"):
        if needed not in names:
            return f"{needed} is not signed"
    if request.headers["x-amz-content-sha256"] != hashlib.sha256(body).hexdigest():
        return "the body's digest"
    headers = {name: request.headers[name] for name in names}
    url = f"http://{request.host}{request.environ['RAW_URI']}"  # request.url is decoded in part
    signed = AWSRequest(request.method, url, headers=headers)
    signed.context["timestamp"] = request.headers["x-amz-date"]
    auth = S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY, TOKEN), "s3", REGION)
    to_sign = auth.string_to_sign(signed, auth.canonical_request(signed))
    if auth.signature(to_sign, signed) != claims["Signature"]:
        return "the signature"
    return None


class Server:
    def __init__(self, bucket):
        self.bucket = bucket
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.http = make_server("127.0.0.1", 0, self, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self.http.port}"
        self.boto3 = boto3.client("s3", endpoint_url=self.endpoint, region_name=REGION)

    def __call__(self, environ, start_response):
        request = Request(environ)
        if request.path.startswith("/_"):
            return self.own_page(request.path)(environ, start_response)
        body = request.get_data()
        environ["wsgi.input"] = io.BytesIO(body)
#boto3's own bodies have their checksum behind them, and a signature for it.
        fault = None if "boto" in request.headers.get("User-Agent", "").lower() else fault_of(request, body)
        if fault:
            error = f"<Error><Code>SignatureDoesNotMatch</Code><Message>{fault}</Message></Error>"
            return Response(error, status=403)(environ, start_response)
        return self.moto(environ, start_response)

    def own_page(self, path):
        if path == "/_uploads":
            return Response(str(len(self.boto3.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))))
        key = path.removeprefix("/_boto3/")
        try:
            return Response(self.boto3.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        except self.boto3.exceptions.NoSuchKey:
            return Response(status=404)

    def run(self):
        serving = threading.Thread(target=self.http.serve_forever)
        serving.start()
        self.boto3.create_bucket(Bucket=self.bucket,
                                 CreateBucketConfiguration={"LocationConstraint": REGION})
        self.boto3.put_object(Bucket=self.bucket, Key="by/boto3", Body=b"written by boto3")
        print("endpoint", self.endpoint, flush=True)
        serving.join()


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    Server(sys.argv[1]).run()
