//! The fuzz targets. Each takes arbitrary bytes, turns them into an input of one entrance, and
//! panics if that breaks a promise.
//!
//! The bytes are choices rather than the input itself, so that random ones pass the checksums and
//! headers and reach the decisions.

mod configuration;
mod node;
mod ports;
mod start;
mod storage;
mod tls;

/// A target.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("wal_segment", storage::wal_segment),
    ("wal_operations", storage::wal_operations),
    ("snapshot_file", storage::snapshot_file),
    ("commands", storage::commands),
    ("messages", node::messages),
    ("conf_changes", node::conf_changes),
    ("greetings", start::greetings),
    ("flags", configuration::flags),
    ("environment", configuration::environment),
    ("configuration_file", configuration::configuration_file),
    ("peer_requests", ports::peer_requests),
    ("client_requests", ports::client_requests),
    ("application_requests", ports::application_requests),
    ("admin_requests", ports::admin_requests),
    ("status_answers", ports::status_answers),
    ("tls_hellos", tls::tls_hellos),
];

/// Choices, taken from the front of the input; all are 0 after its end.
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Below `bound`, which is at most 256.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound
    }

    pub fn pick<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())].clone()
    }

    /// True in one of `n` cases; never after the end of the input.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// Below 65,536.
    pub fn short(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// A number near `own`, an extreme one, or any.
    pub fn number(&mut self, own: u64) -> u64 {
        match self.below(16) {
            0..8 => own,
            8 => own.wrapping_add(1),
            9 => own.wrapping_sub(1),
            10 => 0,
            11 => own.saturating_add(self.byte().into()),
            12 => 1 << 62,
            13 => u64::MAX,
            14 => u64::MAX / 2,
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    /// Up to 255 bytes.
    pub fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    /// Changes some bytes, or the length.
    pub fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(6) {
            let at = self.short() % (bytes.len() + 1);
            match self.below(6) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.byte(),
                2 => bytes.truncate(at),
                3 => bytes.extend_from_slice(self.bytes()),
                4 => {
                    let inserted = self.bytes().to_vec();
                    bytes.splice(at..at, inserted);
                }
                _ => {
                    let end = (at + 512).min(bytes.len());
                    bytes[at..end].fill(0);
                }
            }
        }
    }
}
