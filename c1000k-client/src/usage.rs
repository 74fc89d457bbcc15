//! The memory of the connections at this end.

use c1000k_host::usage::{KernelMeter, ProcessUsage};
use c1000k_record::ConnectionBytes;

/// Memory before the first connect, and its growth during the ramp.
#[derive(Debug)]
pub(crate) struct Usage {
    kernel: KernelMeter,
    rss_at_start_bytes: Option<u64>,
    /// The memory of a connection in this process, by the sizes of its parts; `None` without sockets.
    pub(crate) layers: Option<ConnectionBytes>,
    kernel_bytes: Option<f64>,
    process_bytes: Option<f64>,
}

impl Usage {
    /// Measures the memory before the first connect.
    pub(crate) fn start() -> Self {
        Self {
            kernel: KernelMeter::start(),
            rss_at_start_bytes: rss_bytes(),
            layers: None,
            kernel_bytes: None,
            process_bytes: None,
        }
    }

    /// The ramp has ended with this number of connections.
    pub(crate) fn note_peak(&mut self, held: u64) {
        if held == 0 {
            return;
        }
        self.kernel_bytes = self.kernel.cost().map(|cost| cost.slab_bytes());
        let growth = rss_bytes().zip(self.rss_at_start_bytes);
        let growth = growth.and_then(|(now, before)| now.checked_sub(before));
        // Memory that the process had freed before may hold all that the connections take.
        self.process_bytes =
            growth.filter(|&bytes| bytes > 0).map(|bytes| bytes as f64 / held as f64);
    }

    /// The memory of one connection at this end.
    pub(crate) fn connection_bytes(&self) -> Option<ConnectionBytes> {
        self.layers.map(|layers| ConnectionBytes { kernel: self.kernel_bytes, ..layers })
    }

    /// The growth of the process, per connection.
    pub(crate) fn process_bytes_per_connection(&self) -> Option<f64> {
        self.process_bytes
    }
}

fn rss_bytes() -> Option<u64> {
    ProcessUsage::read().map(|usage| usage.rss_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_divided_by_the_connections_held() {
        let mut usage = Usage::start();
        usage.note_peak(0);
        assert_eq!(usage.process_bytes_per_connection(), None);
        let touched = vec![1_u8; 32 << 20];
        usage.note_peak(1 << 20);
        let each = usage.process_bytes_per_connection().unwrap();
        assert!(each > 24.0, "{each}");
        assert!(touched.iter().all(|&byte| byte == 1));
    }

    #[test]
    fn memory_that_did_not_grow_is_not_known() {
        let mut usage = Usage { rss_at_start_bytes: Some(u64::MAX), ..Usage::start() };
        usage.note_peak(1);
        assert_eq!(usage.process_bytes_per_connection(), None);
    }

    #[test]
    fn clients_without_sockets_have_no_layers() {
        let mut usage = Usage::start();
        assert_eq!(usage.connection_bytes(), None);
        usage.layers = Some(ConnectionBytes { client: 40, ..ConnectionBytes::default() });
        assert_eq!(usage.connection_bytes().map(|bytes| bytes.client), Some(40));
    }
}
