"""What a broker and its clients say to each other.

A broker serves all processes of one user on one machine. It owns the physical memory of shared weights by holding a file
descriptor of each chunk (CUDA: a POSIX file descriptor of the handle; host: a sealed memfd), and no CUDA context.

The wire: a Unix stream socket. A message is a header (`HEADER`: magic, protocol version, count of file descriptors, bytes of
the body; big-endian; it is the same in every version), then the body: JSON of one of the classes below. Descriptors travel
beside the bytes of the body (SCM_RIGHTS), in the order in which the body names them. Every request has an `id`, and its
answer names it in `to`; both sides ask and answer, and answers may come in any order.

The life of a client
    It says Hello and gets Welcome, or Refusal and the end of the connection. An observer (`device` is None) may ask for
    Status and nothing else.
    Place: it names the weights of a model, the broker says in which regions, cut into which chunks, they lie. Everybody
    reserves addresses of its own for a region. A client refers to the regions that it was told of until Forget, or its end.
    Acquire: it needs these chunks. Each is given (a descriptor), or to be made by this client, or pending: somebody else is
    making it. With `wait` the answer comes once at least one of them is no longer pending. The broker has counted the memory
    of what is to be made. Who makes chunks fills them (from the files of ALL weights that lie in them, zeros between), and
    says Loaded with descriptors, or Failed; only then does it wait for what is pending, so nobody waits in a circle.
    Loaded: the broker checks the bytes (host: the sealed memory against the files, and the files against their digests;
    CUDA: the files) and answers Done, or Refusal `altered`; then the chunks are as after Failed.
    Released: it has unmapped these. Sent before any Acquire of the same chunk: the order of messages is the order of things.
    Grow: its pool needs more private memory (activations, workspaces). The answer is its new quota, or Refusal `memory`.

What the broker asks of a client
    Offer: which chunks could it do without now? Give: unmap these, unless they are needed again. Trim: give idle private
    memory back, as far as the new quota. Describe: what are you doing?

A client that ends, or breaks these rules, is forgotten with all that it had; chunks that nobody has stay until their
memory is needed. After the death of a broker its clients say Hello to the next one with `resume`: the regions that they have
and the descriptors of all chunks that they have mapped. Where two bring a chunk of the same id in different memory (made
while there was no broker), the first is kept, and the other's counts as its client's alone (`Welcome.disowned`).
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from glake_infer.sharing.status import MachineStatus, ProcessStatus

PROTOCOL = 1
"""Version of everything below the header."""

MAGIC = b"GLKB"
HEADER = struct.Struct(">4sHHI")

MOST_BYTES = 64 << 20
"""Of a body."""

MOST_DESCRIPTORS = 4096
"""In one message."""

DESCRIPTORS_AT_ONCE = 250
"""In one sendmsg; Linux takes 253 (SCM_MAX_FD)."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[str, Field(pattern=r"^[0-9a-f]{16,32}$")]
"""Of a region, a chunk, or a piece of memory: random, so that no two brokers give the same."""
Bytes = Annotated[int, Field(ge=0, lt=1 << 60)]
Text = Annotated[str, Field(max_length=4096)]


class Message(BaseModel):
    """What all of them are: closed to unknown fields, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(Message):
    """What is answered; `id` is the sender's."""

    id: int = 0


class Answer(Message):
    """`to`: the id of the request."""

    to: int = 0


class Device(Message):
    """A device, known by the same name to all processes: `cpu`, or the UUID of a GPU. `memory`: bytes that it has."""

    name: Text
    title: Text = ""
    memory: Bytes
    granule: Annotated[int, Field(ge=4096, lt=1 << 40)]


class WeightSpec(Message):
    """A weight: the first `mapped` of the `length` bytes of the object `root`/`digest`'s file, `path`.

    `group`: weights of one group are used together; `pieces` and `edges` as in glake_infer/layout.py.
    """

    digest: Digest
    length: Bytes
    mapped: Bytes
    path: Text
    group: int = 0
    pieces: list[Digest] = []
    edges: list[Bytes] = []


class PlacedWeight(Message):
    """Where a weight lies: `offset` bytes from the beginning of its region."""

    digest: Digest
    length: Bytes
    mapped: Bytes
    path: Text
    offset: Bytes


class ChunkSpec(Message):
    """A chunk of a region: the bytes that it has, and those that weights take of them."""

    token: Token
    size: Annotated[int, Field(gt=0, lt=1 << 50)]
    used: Bytes


class RegionSpec(Message):
    """Addresses that belong together: chunks one behind the other, and everything that lies in them.

    `pieces`: of a region of one large weight (layout.Region.parted), the digests of its pieces; its chunks may be in other
    such regions too, where their bytes are the same.
    """

    token: Token
    chunks: Annotated[list[ChunkSpec], Field(min_length=1)]
    weights: Annotated[list[PlacedWeight], Field(min_length=1)]
    pieces: list[Digest] = []


class ChunkMemory(Message):
    """A chunk, and which piece of physical memory it is in."""

    chunk: Token
    memory: Token


class Resume(Message):
    """What a client brings from an earlier broker: with a descriptor for each of `chunks`, in order."""

    regions: list[RegionSpec]
    chunks: list[ChunkMemory]
    quota: Bytes


class Hello(Request):
    """The first message of a client."""

    kind: Literal["hello"] = "hello"
    release: Text
    """Of glake-infer."""
    pid: int
    name: Text
    device: Device | None
    """None: an observer."""
    resume: Resume | None = None


class Welcome(Answer):
    """To Hello. `quota`: bytes of private memory that the client has. `disowned`: what was not taken over."""

    kind: Literal["welcome"] = "welcome"
    release: Text
    broker: Token
    limit: Bytes
    quota: Bytes
    disowned: list[ChunkMemory] = []


class Refusal(Answer):
    """Instead of the answer. `reason` says which error it is, `message` what happened and what to do.

    version, user, message (not understood), unknown (a token), memory (no room within the limit), altered (`digest`, `path`:
    bytes are not what the name stands for), unreadable (the same two: the broker cannot read it), lost (a maker failed, the
    client may ask again), full (of descriptors).
    """

    kind: Literal["refusal"] = "refusal"
    reason: Literal[
        "version", "user", "message", "unknown", "memory", "altered", "unreadable", "lost", "full"
    ]
    message: Text
    digest: str = ""
    path: Text = ""
    requested: Bytes = 0
    used: Bytes = 0
    limit: Bytes = 0
    needed: Bytes = 0
    """The smallest limit that would have done."""
    holders: list[tuple[Text, Text, Bytes]] = []
    """Process, kind of memory ("weights" or "pool"), bytes: the largest first."""


class Place(Request):
    """Say where these lie; answered by Placed. Uses no memory."""

    kind: Literal["place"] = "place"
    weights: Annotated[list[WeightSpec], Field(min_length=1)]


class Placed(Answer):
    """All regions in which weights of the request lie, whole."""

    kind: Literal["placed"] = "placed"
    regions: list[RegionSpec]


class Forget(Request):
    """The client has given these regions back, and has none of their chunks. Answered by Done."""

    kind: Literal["forget"] = "forget"
    regions: list[Token]


class Acquire(Request):
    """Answered by Acquired, or Refusal memory, unknown.

    `wait`: not before one of them is no longer pending. `full`: the device had no room for what the client was to make,
    whatever the limit says: make room for that much on it first.
    """

    kind: Literal["acquire"] = "acquire"
    chunks: Annotated[list[Token], Field(min_length=1)]
    wait: bool = False
    full: bool = False


class Acquired(Answer):
    """With a descriptor for each of `given`, in order. Every chunk of the request is in one of the lists."""

    kind: Literal["acquired"] = "acquired"
    given: list[ChunkMemory] = []
    make: list[Token] = []
    pending: list[Token] = []


class Loaded(Request):
    """With a descriptor for each of `chunks`. Answered by Done, or Refusal altered, unreadable, unknown."""

    kind: Literal["loaded"] = "loaded"
    chunks: Annotated[list[ChunkMemory], Field(min_length=1)]
    read: Bytes = 0
    """Bytes that were read from files for it."""
    seconds: Annotated[float, Field(ge=0)] = 0.0


class Failed(Request):
    """The client makes these no longer. Answered by Done."""

    kind: Literal["failed"] = "failed"
    chunks: list[Token]


class Released(Request):
    """The client has unmapped these. `drop`: and wants their memory to go, if nobody else has it. Answered by Done."""

    kind: Literal["released"] = "released"
    chunks: list[Token]
    drop: bool = False


class Grow(Request):
    """Let the client's private memory reach `quota` bytes. Answered by Granted (that, or more), or Refusal memory."""

    kind: Literal["grow"] = "grow"
    quota: Bytes
    full: bool = False


class Granted(Answer):
    """The client's quota now."""

    kind: Literal["granted"] = "granted"
    quota: Bytes


class Status(Request):
    """Answered by Statement."""

    kind: Literal["status"] = "status"


class Statement(Answer):
    """All that can be seen."""

    kind: Literal["statement"] = "statement"
    status: MachineStatus


class Offer(Request):
    """Broker to client; answered by Offers."""

    kind: Literal["offer"] = "offer"


class Offered(Message):
    """A chunk that a client could do without: of models that are idle and may be put to sleep, or of none (not `awake`)."""

    chunk: Token
    awake: bool
    priority: int
    idle_seconds: Annotated[float, Field(ge=0)]


class Offers(Answer):
    """`idle`: bytes of private memory that Trim would give back. `busy`: bytes of chunks that models use just now.

    `running`: how many uses of models go on that do not wait for chunks.
    """

    kind: Literal["offers"] = "offers"
    chunks: list[Offered]
    idle: Bytes
    busy: Bytes
    running: Annotated[int, Field(ge=0)]


class Give(Request):
    """Broker to client: unmap these, unless they are needed again. Answered by Given: those that are unmapped."""

    kind: Literal["give"] = "give"
    chunks: list[Token]


class Given(Answer):
    """The client has none of them any more (no Released is sent for them)."""

    kind: Literal["given"] = "given"
    chunks: list[Token]


class Trim(Request):
    """Broker to client: give idle private memory back, up to `bytes`; answered by Granted with the quota that is left."""

    kind: Literal["trim"] = "trim"
    bytes: Bytes


class Describe(Request):
    """Broker to client; answered by Description."""

    kind: Literal["describe"] = "describe"


class Description(Answer):
    """What the process is doing."""

    kind: Literal["description"] = "description"
    process: ProcessStatus


class Bye(Request):
    """The client ends, on purpose: it is not one of those that were lost. Not answered."""

    kind: Literal["bye"] = "bye"


class Ping(Request):
    """Are you there? From either side; answered by Done."""

    kind: Literal["ping"] = "ping"


class Done(Answer):
    """It is done."""

    kind: Literal["done"] = "done"


AnyMessage = Annotated[
    Hello | Welcome | Refusal | Place | Placed | Forget | Acquire | Acquired | Loaded | Failed | Released | Grow
    | Granted | Status | Statement | Offer | Offers | Give | Given | Trim | Describe | Description | Bye | Ping | Done,
    Field(discriminator="kind"),
]  # fmt: skip

_adapter: TypeAdapter[AnyMessage] = TypeAdapter(AnyMessage)


def encode(message: Message) -> bytes:
    """The body of a message."""
    return message.model_dump_json().encode()


def decode(body: bytes) -> AnyMessage:
    """The message of a body; raises pydantic.ValidationError for anything else."""
    return _adapter.validate_json(body)
