# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: always_allow_keywords=False, binding=False, autotestdict=False
"""The ring, native: the hash of PostgreSQL and the lookup of owners. Compiled to `shardkit._ring`.

`shardkit.core._pyring` is the same interface in pure Python, with the sources of every rule; each is the test of the
other. Import it through `shardkit.core.ring`.

A position is compared as its *place*: the position with its sign bit flipped, so that unsigned order is ring order. On
a ring whose tokens all lie on slot ends, one load from a table of 65,536 owners answers. On any other ring a table of
at least two buckets a token holds either the owner of the whole bucket or the first token that may end an arc in it,
from where a short scan, or on a crowded bucket a bisection, finds the token.

Functions of one argument are METH_O (no keywords, no binding): 13 ns a call less. Buffers are read in blocks with the
GIL released: a first loop of arithmetic only, which the compiler vectorises, then a second one of table loads.
"""

cimport cython
from cpython.array cimport array, clone
from cpython.buffer cimport PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.exc cimport PyErr_Clear
from cpython.list cimport PyList_CheckExact, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject, Py_TYPE
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_GET_LENGTH
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from array import array as new_array
from uuid import UUID

from shardkit.core._ringargs import (
    INT64_FORMATS as _INT64_FORMATS,
    checked_position,
    checked_ring,
    int64_view,
    listed_keys,
    listed_positions,
    plain_key,
)

cdef extern from *:
    """
    #include <structmember.h>  /* PyMemberDef, before Python 3.12 */

    /* Constants the compiler sees, as Cython's own module variables are not. */
    #define SHARDKIT_SIGN ((uint64_t)1 << 63)
    #define SHARDKIT_IN_SLOT (((uint64_t)1 << 48) - 1)
    #define SHARDKIT_WHOLE ((uint32_t)1 << 31)
    #define SHARDKIT_GOLDEN ((uint32_t)(0x9E3779B9u + 3923095u))

    #if defined(__GNUC__)
    #define shardkit_prefetch(address) __builtin_prefetch(address)
    #else
    #define shardkit_prefetch(address) ((void)(address))
    #endif

    /* Offset of the slot behind a __slots__ attribute, or -1 if it is no such attribute. */
    static Py_ssize_t shardkit_slot_offset(PyObject *descriptor)
    {
        if (Py_TYPE(descriptor) != &PyMemberDescr_Type)
            return -1;
        return ((PyMemberDescrObject *)descriptor)->d_member->offset;
    }

    /* The 16 bytes, first the most significant one, of an int that fits; else 0. */
    static int shardkit_16_bytes(PyObject *number, unsigned char *bytes)
    {
    #if PY_VERSION_HEX >= 0x030D0000
        Py_ssize_t needed = PyLong_AsNativeBytes(
            number, bytes, 16, Py_ASNATIVEBYTES_BIG_ENDIAN | Py_ASNATIVEBYTES_UNSIGNED_BUFFER);
        return needed >= 0 && needed <= 16;
    #else
        return _PyLong_AsByteArray((PyLongObject *)number, bytes, 16, 0, 0) == 0;
    #endif
    }
    """
    const uint64_t SIGN "SHARDKIT_SIGN"
    const uint64_t IN_SLOT "SHARDKIT_IN_SLOT"
    const uint32_t WHOLE "SHARDKIT_WHOLE"
    const uint32_t GOLDEN "SHARDKIT_GOLDEN"
    void shardkit_prefetch(const void *address) noexcept nogil
    Py_ssize_t shardkit_slot_offset(object descriptor) noexcept
    bint shardkit_16_bytes(PyObject *number, uint8_t *data) noexcept

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1
    bint PyUnicode_IS_COMPACT_ASCII(object text) noexcept
    void *PyUnicode_DATA(object text) noexcept
    const char *PyUnicode_AsUTF8AndSize(PyObject *text, Py_ssize_t *size) noexcept

ctypedef const uint8_t *bytes_at

cdef enum:
    BLOCK = 256
    AHEAD = 16
    SCAN = 8

cdef array NO_POSITIONS = new_array("q")
cdef array NO_OWNERS = new_array("H")
cdef PyObject *UUID_TYPE = <PyObject *>UUID
cdef Py_ssize_t UUID_INT = shardkit_slot_offset(UUID.__dict__["int"])


# --- the hash ------------------------------------------------------------------------------------------------------


cdef inline uint32_t rot(uint32_t word, int bits) noexcept nogil:
    return word << bits | word >> (32 - bits)


cdef inline uint64_t final(uint32_t a, uint32_t b, uint32_t c) noexcept nogil:
    c = (c ^ b) - rot(b, 14)
    a = (a ^ c) - rot(c, 11)
    b = (b ^ a) - rot(a, 25)
    c = (c ^ b) - rot(b, 16)
    a = (a ^ c) - rot(c, 4)
    b = (b ^ a) - rot(a, 14)
    c = (c ^ b) - rot(b, 24)
    return <uint64_t>b << 32 | c


cdef inline uint64_t hash_int(int64_t value) noexcept nogil:
    # The halves are folded so that an int2, an int4 and an int8 of one value hash alike.
    # All of it in words of 32 bits, which the compiler can put four abreast.
    cdef int32_t high = <int32_t>(value >> 32)
    cdef uint32_t word = <uint32_t>value ^ <uint32_t>high ^ <uint32_t>(high >> 31)
    cdef uint32_t start = GOLDEN + 4
    return final(start + word, start, start)


cdef inline uint32_t word_at(bytes_at data) noexcept nogil:
    return data[0] | <uint32_t>data[1] << 8 | <uint32_t>data[2] << 16 | <uint32_t>data[3] << 24


cdef inline uint32_t short_word_at(bytes_at data, Py_ssize_t size) noexcept nogil:
    cdef uint32_t word = 0
    if size > 0:
        word = data[0]
    if size > 1:
        word |= <uint32_t>data[1] << 8
    if size > 2:
        word |= <uint32_t>data[2] << 16
    return word


cdef inline uint64_t hash_bytes(bytes_at data, Py_ssize_t size) noexcept nogil:
    cdef uint32_t a, b, c
    a = b = c = GOLDEN + <uint32_t>size
    while size >= 12:
        a += word_at(data)
        b += word_at(data + 4)
        c += word_at(data + 8)
        a = (a - c) ^ rot(c, 4)
        c += b
        b = (b - a) ^ rot(a, 6)
        a += c
        c = (c - b) ^ rot(b, 8)
        b += a
        a = (a - c) ^ rot(c, 16)
        c += b
        b = (b - a) ^ rot(a, 19)
        a += c
        c = (c - b) ^ rot(b, 4)
        b += a
        data += 12
        size -= 12
    if size >= 8:
        a += word_at(data)
        b += word_at(data + 4)
        # The lowest byte of c is reserved for the length.
        c += short_word_at(data + 8, size - 8) << 8
    elif size >= 4:
        a += word_at(data)
        b += short_word_at(data + 4, size - 4)
    else:
        a += short_word_at(data, size)
    return final(a, b, c)


cdef int64_t key_position(object key) except? -1:
    cdef int overflow
    cdef long long value
    cdef Py_ssize_t size
    cdef const char *utf8
    cdef PyObject *number
    cdef uint8_t data[16]
    if PyLong_CheckExact(key):
        value = PyLong_AsLongLongAndOverflow(key, &overflow)
        if not overflow:
            return <int64_t>hash_int(value)
    elif PyUnicode_CheckExact(key):
        if PyUnicode_IS_COMPACT_ASCII(key):
            return <int64_t>hash_bytes(<bytes_at>PyUnicode_DATA(key), PyUnicode_GET_LENGTH(key))
        utf8 = PyUnicode_AsUTF8AndSize(<PyObject *>key, &size)
        if utf8 != NULL:
            return <int64_t>hash_bytes(<bytes_at>utf8, size)
        PyErr_Clear()
    elif <PyObject *>Py_TYPE(key) == UUID_TYPE and UUID_INT > 0:
        number = (<PyObject **>(<char *><PyObject *>key + UUID_INT))[0]
        if number != NULL and PyLong_CheckExact(<object>number):
            if shardkit_16_bytes(number, data):
                return <int64_t>hash_bytes(data, 16)
            PyErr_Clear()
    return key_position_slowly(key)


cdef int64_t key_position_slowly(object key) except? -1:
    plain = plain_key(key)
    if isinstance(plain, UUID):
        return <int64_t>hash_bytes(<bytes><object>plain.bytes, 16)
    return key_position(plain)


def position(key):
    """The position of a key: the signed 64-bit hash that PostgreSQL computes for it.

    `KeyTypeError` for a bool, None, another type, an int outside the signed 64 bits, a str with a surrogate.
    """
    return key_position(key)


def positions(keys):
    """Positions of many keys, in their order, as an array of int64.

    ``keys`` is any buffer of signed 64-bit ints in one dimension, or an iterable of keys.
    """
    cdef array found
    cdef _Ints ints
    if PyObject_CheckBuffer(keys):
        ints = _Ints(keys)
        found = clone(NO_POSITIONS, ints.count, False)
        with nogil:
            hash_all(ints, found.data.as_longlongs)
        return found
    return positions_of_list(keys if PyList_CheckExact(keys) else listed_keys(keys))


cdef array positions_of_list(list keys):
    cdef Py_ssize_t i, count = PyList_GET_SIZE(keys)
    cdef array found = clone(NO_POSITIONS, count, False)
    cdef long long *out = found.data.as_longlongs
    for i in range(count):
        # Look again each time: a key's own code may have changed the list.
        if i >= PyList_GET_SIZE(keys):
            raise RuntimeError("the list of keys changed its size while it was read")
        if i + AHEAD < PyList_GET_SIZE(keys):
            shardkit_prefetch(PyList_GET_ITEM(keys, i + AHEAD))
        out[i] = key_position(<object>PyList_GET_ITEM(keys, i))
    return found


# --- buffers of int64 ----------------------------------------------------------------------------------------------


@cython.final
cdef class _Ints:
    """A buffer of signed 64-bit ints, held while it is read."""

    cdef Py_buffer view
    cdef bint held
    cdef Py_ssize_t count
    cdef const char *data
    cdef Py_ssize_t stride
    cdef bint direct

    def __cinit__(self, source):
        PyObject_GetBuffer(source, &self.view, PyBUF_RECORDS_RO)
        self.held = True
        if (
            self.view.ndim != 1
            or self.view.itemsize != 8
            or self.view.format == NULL
            or self.view.format.decode() not in _INT64_FORMATS
        ):
            int64_view(memoryview(source))
        self.count = self.view.shape[0]
        self.data = <const char *>self.view.buf
        self.stride = self.view.strides[0]
        self.direct = self.stride == 8 and not (<size_t>self.data & 7)

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef inline const int64_t *block(self, Py_ssize_t start, Py_ssize_t size, int64_t *spare) noexcept nogil:
        """``size`` ints from ``start`` on: in place, or gathered into ``spare``."""
        cdef Py_ssize_t i
        if self.direct:
            return <const int64_t *>self.data + start
        for i in range(size):
            memcpy(spare + i, self.data + (start + i) * self.stride, 8)
        return spare


cdef void hash_all(_Ints ints, long long *out) noexcept nogil:
    cdef int64_t spare[BLOCK]
    cdef const int64_t *values
    cdef Py_ssize_t i, size, start = 0
    while start < ints.count:
        size = min(<Py_ssize_t>BLOCK, ints.count - start)
        values = ints.block(start, size, spare)
        for i in range(size):
            out[start + i] = <long long>hash_int(values[i])
        start += size


# --- the ring ------------------------------------------------------------------------------------------------------


@cython.final
cdef class Ring:
    """Sorted tokens with an owner each: a position belongs to the first token at or after it, wrapping round.

    Immutable; equal, hashed and pickled by value; safe to share between threads.
    """

    cdef readonly tuple tokens
    cdef readonly tuple owners_by_token
    cdef Py_ssize_t count
    cdef uint16_t *slots
    cdef uint32_t *buckets
    cdef int shift
    cdef uint64_t *ends
    cdef uint16_t *numbers

    def __cinit__(self, tokens, owners):
        cdef array checked, numbers
        cdef Py_ssize_t i
        cdef bint aligned = True
        checked, numbers = checked_ring(tokens, owners)
        self.tokens = tuple(checked)
        self.owners_by_token = tuple(numbers)
        self.count = len(checked)
        self.ends = <uint64_t *>allocated((self.count + 1) * sizeof(uint64_t))
        self.numbers = <uint16_t *>allocated((self.count + 1) * sizeof(uint16_t))
        for i in range(self.count):
            self.ends[i] = <uint64_t>checked.data.as_longlongs[i] ^ SIGN
            self.numbers[i] = numbers.data.as_ushorts[i]
            aligned = aligned and self.ends[i] & IN_SLOT == IN_SLOT
        # Past the last token the ring goes on at the first; this end also stops every scan.
        self.ends[self.count] = <uint64_t>-1
        self.numbers[self.count] = self.numbers[0]
        if aligned:
            self.fill_slots()
        else:
            self.fill_buckets()

    def __dealloc__(self):
        PyMem_Free(self.slots)
        PyMem_Free(self.buckets)
        PyMem_Free(self.ends)
        PyMem_Free(self.numbers)

    cdef int fill_slots(self) except -1:
        cdef Py_ssize_t slot, i = 0
        self.slots = <uint16_t *>allocated(65536 * sizeof(uint16_t))
        for slot in range(65536):
            while self.ends[i] >> 48 < <uint64_t>slot:
                i += 1
            # By the top bits of the position as it is, so that a lookup need not flip the sign.
            self.slots[slot ^ 0x8000] = self.numbers[i]
        return 0

    cdef int fill_buckets(self) except -1:
        # Many more buckets than tokens on a small ring: a whole bucket is a branch that is guessed right.
        cdef int bits = 15
        cdef uint64_t first, last, bucket
        cdef Py_ssize_t i = 0
        while bits < 24 and <Py_ssize_t>1 << bits < 2 * self.count:
            bits += 1
        self.shift = 64 - bits
        self.buckets = <uint32_t *>allocated((<size_t>1 << bits) * sizeof(uint32_t))
        for bucket in range(<uint64_t>1 << bits):
            first = bucket << self.shift
            last = first + ((<uint64_t>1 << self.shift) - 1)
            while self.ends[i] < first:
                i += 1
            if self.ends[i] >= last:
                self.buckets[bucket] = WHOLE | self.numbers[i]
            else:
                self.buckets[bucket] = <uint32_t>i
        return 0

    cdef inline uint16_t at(self, uint64_t position) noexcept nogil:
        if self.slots != NULL:
            return self.slots[position >> 48]
        return self.at_bucket(position ^ SIGN)

    cdef inline uint16_t at_bucket(self, uint64_t place) noexcept nogil:
        cdef uint32_t entry = self.buckets[place >> self.shift]
        cdef Py_ssize_t i, low, high, middle
        if entry & WHOLE:
            return <uint16_t>entry
        low = entry
        for i in range(SCAN):
            if self.ends[low] >= place:
                return self.numbers[low]
            low += 1
        high = self.count
        while low < high:
            middle = (low + high) >> 1
            if self.ends[middle] < place:
                low = middle + 1
            else:
                high = middle
        return self.numbers[low]

    def owner(self, key):
        """The owner of a key."""
        return self.at(<uint64_t>key_position(key))

    def __getitem__(self, key):
        return self.at(<uint64_t>key_position(key))

    def owner_at(self, position):
        """The owner of a position; ValueError outside the signed 64 bits."""
        cdef int overflow
        cdef long long value
        if PyLong_CheckExact(position):
            value = PyLong_AsLongLongAndOverflow(position, &overflow)
            if not overflow:
                return self.at(<uint64_t>value)
        return self.at(<uint64_t><int64_t>checked_position(position))

    def owners(self, keys):
        """Owners of many keys (see `positions`), in their order, as an array of uint16."""
        cdef array found
        cdef _Ints ints
        if PyObject_CheckBuffer(keys):
            ints = _Ints(keys)
            found = clone(NO_OWNERS, ints.count, False)
            with nogil:
                self.owners_of_ints(ints, found.data.as_ushorts)
            return found
        return self.owners_of_list(keys if PyList_CheckExact(keys) else listed_keys(keys))

    cdef array owners_of_list(self, list keys):
        cdef Py_ssize_t i, count = PyList_GET_SIZE(keys)
        cdef array found = clone(NO_OWNERS, count, False)
        cdef uint16_t *out = found.data.as_ushorts
        for i in range(count):
            # As in positions_of_list.
            if i >= PyList_GET_SIZE(keys):
                raise RuntimeError("the list of keys changed its size while it was read")
            if i + AHEAD < PyList_GET_SIZE(keys):
                shardkit_prefetch(PyList_GET_ITEM(keys, i + AHEAD))
            out[i] = self.at(<uint64_t>key_position(<object>PyList_GET_ITEM(keys, i)))
        return found

    cdef void owners_of_ints(self, _Ints ints, uint16_t *out) noexcept nogil:
        cdef int64_t spare[BLOCK]
        cdef uint16_t slot[BLOCK]
        cdef uint64_t place[BLOCK]
        cdef const int64_t *values
        cdef Py_ssize_t i, size, start = 0
        while start < ints.count:
            size = min(<Py_ssize_t>BLOCK, ints.count - start)
            values = ints.block(start, size, spare)
            if self.slots != NULL:
                for i in range(size):
                    slot[i] = <uint16_t>(hash_int(values[i]) >> 48)
                for i in range(size):
                    out[start + i] = self.slots[slot[i]]
            else:
                for i in range(size):
                    place[i] = hash_int(values[i]) ^ SIGN
                for i in range(size):
                    out[start + i] = self.at_bucket(place[i])
            start += size

    def owners_at(self, positions):
        """Owners of many positions (a buffer of int64, or an iterable), as an array of uint16."""
        cdef _Ints ints = _Ints(positions if PyObject_CheckBuffer(positions) else listed_positions(positions))
        cdef array found = clone(NO_OWNERS, ints.count, False)
        with nogil:
            self.owners_of_positions(ints, found.data.as_ushorts)
        return found

    cdef void owners_of_positions(self, _Ints ints, uint16_t *out) noexcept nogil:
        cdef int64_t spare[BLOCK]
        cdef const int64_t *values
        cdef Py_ssize_t i, size, start = 0
        while start < ints.count:
            size = min(<Py_ssize_t>BLOCK, ints.count - start)
            values = ints.block(start, size, spare)
            for i in range(size):
                out[start + i] = self.at(<uint64_t>values[i])
            start += size

    def __len__(self):
        return self.count

    def __iter__(self):
        # A ring looks up keys; without this, iteration would ask for the owners of 0, 1, 2 without end.
        raise TypeError("'Ring' object is not iterable")

    def __eq__(self, other):
        if not isinstance(other, Ring):
            return NotImplemented
        return self.tokens == other.tokens and self.owners_by_token == other.owners_by_token

    def __hash__(self):
        return hash((self.tokens, self.owners_by_token))

    def __repr__(self):
        return f"<Ring of {self.count} tokens, {len(set(self.owners_by_token))} owners>"

    def __reduce__(self):
        from shardkit.core.ring import Ring as Chosen

        return (Chosen, (self.tokens, self.owners_by_token))


cdef void *allocated(size_t size) except NULL:
    cdef void *memory = PyMem_Malloc(size)
    if memory == NULL:
        raise MemoryError()
    return memory
