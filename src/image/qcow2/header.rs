//! The header of a qcow2 file: what it says, and what is refused.
//!
//! All numbers are big-endian. Version 2 ends at byte 72; header extensions follow, then the backing file's name.
//!
//! ```text
//!  0 magic        4 version       8 backing name at   16 ... its length   20 cluster bits   24 disk size   32 encryption
//! 36 L1 entries  40 L1 table at  48 refcount table at 56 ... its clusters 60 snapshots      64 snapshots at
//! 72 incompatible features       80 compatible ones   88 autoclear ones   96 refcount order 100 header length  104 compression
//! ```
//!
//! Nothing here is trusted: a file comes from anywhere. What is read has a bound (QEMU's own), and is seen to lie in the file.

use super::host::Host;
use super::{damaged, entry};
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

/// First bytes of the file.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
pub(super) const V3_HEADER_BYTES: u64 = 104;
const V2_HEADER_BYTES: u64 = 72;

/// Places of what is changed while the image is open.
const SIZE_AT: u64 = 24;
const L1_AT: u64 = 36;
const REFCOUNT_TABLE_AT: u64 = 48;
const AUTOCLEAR_AT: u64 = 88;

/// QEMU's bounds (block/qcow2.h).
pub(super) const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const BACKING_NAME_BYTES_MAX: u32 = 1023;
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const EXTENSIONS_MAX: usize = 256;

const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// What the header says.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// The disk's size at the time of opening.
    pub(super) size_bytes: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    /// A refcount has `1 << refcount_order` bits.
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    /// As it is written there: mostly a path, relative to this file's directory.
    pub(super) backing_name: Option<String>,
    pub(super) backing_format: Option<String>,
    autoclear: u64,
    has_bitmaps: bool,
}

/// Numbers in the header's first bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: u64) -> u32 {
        let at = super::host::in_memory(at);
        self.0.get(at..at + 4).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().expect("four bytes")))
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }
}

impl Header {
    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// A table of the second level maps so many bytes of the disk.
    pub(super) fn l2_span_bytes(&self) -> u64 {
        // An entry has 8 bytes.
        1 << (2 * self.cluster_bits - 3)
    }

    /// Version 3 can say that a cluster reads as zeroes whatever the backing file has there.
    pub(super) fn has_zero_clusters(&self) -> bool {
        self.version >= 3
    }

    /// Reads and checks the header. Writes nothing.
    ///
    /// # Errors
    /// Names the feature that is not supported, or what is wrong.
    pub(super) fn read(host: &Host, writable: bool) -> Result<Header> {
        let name = host.name();
        let mut bytes = vec![0; super::host::in_memory(host.len_bytes().min(1 << *CLUSTER_BITS.start()))];
        host.read_metadata(0, &mut bytes)?;
        let fields = Fields(&bytes);
        if bytes.len() < 512 && bytes.len() < super::host::in_memory(V2_HEADER_BYTES) || bytes[..4] != MAGIC {
            return Err(damaged(name, "there is no whole header"));
        }
        let version = fields.u32(4);
        if !(2..=3).contains(&version) {
            let what = format!("qcow2 version {version} is not known:");
            return Err(Error::new(ErrorKind::Unsupported, what).on(name));
        }
        let cluster_bits = fields.u32(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(damaged(name, format!("clusters of 2^{cluster_bits} bytes")));
        }
        if fields.u32(32) != 0 {
            let what = "encrypted qcow2 files are not supported:";
            return Err(Error::new(ErrorKind::Unsupported, what).on(name).advise(convert_advice(name)));
        }
        let v3 = version >= 3;
        let header_bytes = if v3 { u64::from(fields.u32(100)) } else { V2_HEADER_BYTES };
        if v3 && (header_bytes < V3_HEADER_BYTES || header_bytes % 8 != 0 || header_bytes > 1 << cluster_bits) {
            return Err(damaged(name, format!("a header of {header_bytes} bytes")));
        }
        let (incompatible, autoclear) = if v3 { (fields.u64(72), fields.u64(AUTOCLEAR_AT)) } else { (0, 0) };
        let refcount_order = if v3 { fields.u32(96) } else { 4 };
        if refcount_order > 6 {
            return Err(damaged(name, format!("refcounts of 2^{refcount_order} bits")));
        }
        let mut header = Header {
            version,
            cluster_bits,
            size_bytes: fields.u64(SIZE_AT),
            l1_offset: fields.u64(L1_AT + 4),
            l1_entries: fields.u32(L1_AT),
            refcount_table_offset: fields.u64(REFCOUNT_TABLE_AT),
            refcount_table_clusters: fields.u32(REFCOUNT_TABLE_AT + 8),
            refcount_order,
            snapshots: fields.u32(60),
            backing_name: None,
            backing_format: None,
            autoclear,
            has_bitmaps: false,
        };
        let (backing_at, backing_len) = (fields.u64(8), fields.u32(16));
        let extensions_end = if backing_at == 0 { header.cluster_bytes() } else { backing_at };
        let names = header.read_extensions(host, header_bytes, extensions_end)?;
        check_features(name, incompatible, &names, writable)?;
        header.check_tables(host)?;
        if backing_at != 0 {
            header.backing_name = Some(read_backing_name(host, backing_at, backing_len, header.cluster_bytes())?);
        }
        Ok(header)
    }

    /// Returns the names of features that the file brings along: type, bit and name.
    fn read_extensions(&mut self, host: &Host, start: u64, end: u64) -> Result<Vec<(u8, u8, String)>> {
        let (mut at, mut names) = (start, Vec::new());
        let end = end.min(self.cluster_bytes()).min(host.len_bytes());
        for _ in 0..EXTENSIONS_MAX {
            if at + 8 > end {
                return Ok(names);
            }
            let mut head = [0; 8];
            host.read_metadata(at, &mut head)?;
            let (kind, len) = (Fields(&head).u32(0), u64::from(Fields(&head).u32(4)));
            if kind == EXTENSION_END {
                return Ok(names);
            }
            if len > end - at - 8 {
                return Err(damaged(host.name(), "a header extension that is too long"));
            }
            let mut data = vec![0; super::host::in_memory(len)];
            host.read_metadata(at + 8, &mut data)?;
            match kind {
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(String::from_utf8_lossy(&data).into_owned()),
                EXTENSION_BITMAPS => self.has_bitmaps = true,
                EXTENSION_FEATURE_NAMES => names.extend(data.chunks_exact(48).map(|one| {
                    let text: Vec<u8> = one[2..].iter().copied().take_while(|&byte| byte != 0).collect();
                    (one[0], one[1], String::from_utf8_lossy(&text).into_owned())
                })),
                _ => (),
            }
            at += 8 + len.next_multiple_of(8);
        }
        Err(damaged(host.name(), "header extensions without end"))
    }

    /// Sizes and places of the two tables that are read as a whole.
    fn check_tables(&self, host: &Host) -> Result<()> {
        let name = host.name();
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > L1_BYTES_MAX || i64::try_from(self.size_bytes).is_err() {
            return Err(damaged(name, format!("a disk of {} bytes", self.size_bytes)));
        }
        if self.size_bytes.div_ceil(self.l2_span_bytes()) > u64::from(self.l1_entries) {
            return Err(damaged(name, "the L1 table is too small for the disk"));
        }
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table_bytes > REFCOUNT_TABLE_BYTES_MAX || table_bytes == 0 {
            return Err(damaged(name, format!("a refcount table of {table_bytes} bytes")));
        }
        for (what, offset, len) in
            [("L1 table", self.l1_offset, l1_bytes), ("refcount table", self.refcount_table_offset, table_bytes)]
        {
            let inside = offset.checked_add(len).is_some_and(|end| end <= host.len_bytes());
            if len > 0 && (offset == 0 || offset % self.cluster_bytes() != 0 || !inside) {
                return Err(damaged(name, format!("the {what} is not in the file")));
            }
        }
        Ok(())
    }

    /// Clears the bits that say that extensions are up to date which we do not keep so: QEMU then knows that its bitmaps are not.
    pub(super) fn clear_autoclear(&self, host: &Host) -> Result<()> {
        if self.autoclear == 0 {
            return Ok(());
        }
        if self.has_bitmaps {
            log::warn!("{}: its persistent bitmaps are not kept up to date, they are marked as invalid", host.name());
        }
        host.write_numbers(AUTOCLEAR_AT, &[0])
    }

    /// Writes where the L1 table is, and how many entries it has.
    pub(super) fn write_l1(host: &Host, offset: u64, entries: u32) -> Result<()> {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&entries.to_be_bytes());
        bytes[4..].copy_from_slice(&offset.to_be_bytes());
        host.write_metadata(L1_AT, &bytes)
    }

    /// Writes where the refcount table is, and how many clusters it has.
    pub(super) fn write_refcount_table(host: &Host, offset: u64, clusters: u32) -> Result<()> {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        host.write_metadata(REFCOUNT_TABLE_AT, &bytes)
    }

    /// Writes the disk's size.
    pub(super) fn write_size(host: &Host, size_bytes: u64) -> Result<()> {
        host.write_numbers(SIZE_AT, &[size_bytes])
    }

    /// The place of a refcount table or an L2 table in an entry, if it is one.
    pub(super) fn table_at(&self, entry: u64) -> Result<Option<(u64, bool)>, &'static str> {
        match entry::table(entry) {
            Some((offset, _)) if offset % self.cluster_bytes() != 0 => Err("a table that is not a cluster"),
            found => Ok(found),
        }
    }
}

fn read_backing_name(host: &Host, at: u64, len: u32, cluster_bytes: u64) -> Result<String> {
    let inside = at.checked_add(len.into()).is_some_and(|end| end <= cluster_bytes);
    if len == 0 || len > BACKING_NAME_BYTES_MAX || !inside {
        return Err(damaged(host.name(), "the name of the backing file is not in the header"));
    }
    let mut bytes = vec![0; super::host::in_memory(len.into())];
    host.read_metadata(at, &mut bytes)?;
    match String::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name),
        _ => Err(damaged(host.name(), "the name of the backing file is no text")),
    }
}

fn convert_advice(name: &str) -> String {
    format!("convert it: qemu-img convert -O qcow2 {name} NEW.qcow2")
}

fn check_features(name: &str, incompatible: u64, names: &[(u8, u8, String)], writable: bool) -> Result<()> {
    let unsupported = |what: String| {
        Err(Error::new(ErrorKind::Unsupported, format!("{what}:")).on(name).advise(convert_advice(name)))
    };
    if incompatible & CORRUPT != 0 {
        let what = "the file is marked as corrupt:";
        return Err(Error::new(ErrorKind::Corrupt, what).on(name).advise("repair it: qemu-img check -r all"));
    }
    if incompatible & EXTERNAL_DATA != 0 {
        return unsupported("qcow2 files with an external data file are not supported".into());
    }
    if incompatible & COMPRESSION_TYPE != 0 {
        return unsupported("qcow2 files compressed with zstd are not supported".into());
    }
    if incompatible & EXTENDED_L2 != 0 {
        return unsupported("qcow2 files with extended L2 entries (subclusters) are not supported".into());
    }
    let known = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;
    let unknown = incompatible & !known;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let called = names.iter().find(|(kind, number, _)| *kind == 0 && u32::from(*number) == bit);
        let called = called.map_or_else(|| format!("number {bit}"), |(_, _, name)| format!("'{name}'"));
        return unsupported(format!("the qcow2 feature {called} is not supported"));
    }
    if incompatible & DIRTY != 0 && writable {
        let what = "the file was not closed properly, and its refcounts are not kept up to date (lazy_refcounts):";
        return Err(Error::new(ErrorKind::Corrupt, what).on(name).advise("repair it: qemu-img check -r all"));
    }
    Ok(())
}

/// A header of version 3 for a new file, and what follows it in the first cluster.
///
/// # Errors
/// It does not fit a cluster.
pub(super) fn encode(header: &Header, name: &str) -> Result<Vec<u8>> {
    let mut bytes = vec![0; super::host::in_memory(header.cluster_bytes())];
    let too_long = || Error::usage("clusters are too small for the name of the backing file:").on(name);
    let mut put = |at: u64, value: &[u8]| {
        let at = super::host::in_memory(at);
        bytes.get_mut(at..at + value.len()).map(|place| place.copy_from_slice(value)).ok_or_else(too_long)
    };
    put(0, &MAGIC)?;
    put(4, &header.version.to_be_bytes())?;
    put(20, &header.cluster_bits.to_be_bytes())?;
    put(SIZE_AT, &header.size_bytes.to_be_bytes())?;
    put(L1_AT, &header.l1_entries.to_be_bytes())?;
    put(L1_AT + 4, &header.l1_offset.to_be_bytes())?;
    put(REFCOUNT_TABLE_AT, &header.refcount_table_offset.to_be_bytes())?;
    put(REFCOUNT_TABLE_AT + 8, &header.refcount_table_clusters.to_be_bytes())?;
    let mut at = V2_HEADER_BYTES;
    if header.version >= 3 {
        put(96, &header.refcount_order.to_be_bytes())?;
        let len = u32::try_from(V3_HEADER_BYTES).expect("small");
        put(100, &len.to_be_bytes())?;
        at = V3_HEADER_BYTES;
    }
    if let Some(format) = &header.backing_format {
        let len = u32::try_from(format.len()).map_err(|_| too_long())?;
        put(at, &EXTENSION_BACKING_FORMAT.to_be_bytes())?;
        put(at + 4, &len.to_be_bytes())?;
        put(at + 8, format.as_bytes())?;
        at += 8 + u64::from(len).next_multiple_of(8);
    }
    // The end of the extensions: type and length 0.
    at += 8;
    if let Some(backing) = &header.backing_name {
        let len =
            u32::try_from(backing.len()).ok().filter(|len| *len <= BACKING_NAME_BYTES_MAX).ok_or_else(too_long)?;
        put(8, &at.to_be_bytes())?;
        put(16, &len.to_be_bytes())?;
        put(at, backing.as_bytes())?;
    }
    Ok(bytes)
}

impl Header {
    /// For a new file.
    pub(super) fn new(version: u32, cluster_bits: u32, size_bytes: u64) -> Header {
        Header {
            version,
            cluster_bits,
            size_bytes,
            l1_offset: 0,
            l1_entries: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            refcount_order: 4,
            snapshots: 0,
            backing_name: None,
            backing_format: None,
            autoclear: 0,
            has_bitmaps: false,
        }
    }

    pub(super) fn place(&self) -> ByteRange {
        ByteRange::new(0, self.cluster_bytes())
    }

    /// The L1 table at the time of opening.
    pub(super) fn l1_place(&self) -> ByteRange {
        ByteRange::new(self.l1_offset, u64::from(self.l1_entries) * 8)
    }

    /// The refcount table at the time of opening.
    pub(super) fn refcount_table_place(&self) -> ByteRange {
        ByteRange::new(self.refcount_table_offset, u64::from(self.refcount_table_clusters) << self.cluster_bits)
    }
}
