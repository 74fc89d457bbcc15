//! Metrics for Prometheus, served by a thread of their own.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::SigSet;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// The timeout of a request, and of its answer.
const REQUEST_WITHIN: Duration = Duration::from_secs(2);
/// The pause if accepting fails, for example without a free descriptor.
const PAUSE: Duration = Duration::from_millis(100);
/// The maximum length of a request.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves the metrics that were published last at `/metrics`, one request at a time.
#[derive(Clone, Debug)]
pub struct Endpoint {
    page: Arc<Mutex<Arc<str>>>,
    address: SocketAddr,
}

impl Endpoint {
    /// Listens on the address. All signals are blocked in its thread.
    ///
    /// # Errors
    /// The address can't be bound, or no thread can be started.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let page = Arc::new(Mutex::new(Arc::from("# EOF\n")));
        let shared = Arc::clone(&page);
        let serve = move || {
            loop {
                match listener.accept() {
                    // It is no error if the reader closes the connection early.
                    Ok((stream, _)) => _ = answer(stream, &shared),
                    Err(_) => thread::sleep(PAUSE),
                }
            }
        };
        let before = SigSet::thread_get_mask()?;
        SigSet::all().thread_block()?;
        let started = thread::Builder::new().name("metrics".to_owned()).spawn(serve);
        before.thread_set_mask()?;
        started?;
        Ok(Self { page, address })
    }

    /// Reads `ADDRESS:PORT`, or a port of the loopback address.
    ///
    /// # Errors
    /// A sentence about what is accepted.
    pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
        let port = || text.trim_start_matches(':').parse().ok();
        let loopback = || Some((Ipv4Addr::LOCALHOST, port()?).into());
        text.parse().ok().or_else(loopback).ok_or_else(|| {
            format!("{text:?} is not an address; write it as 127.0.0.1:9100, [::1]:9100 or 9100")
        })
    }

    /// Listens on the address of a program's `--metrics`.
    ///
    /// # Errors
    /// One line with the reason.
    pub fn open(address: SocketAddr) -> Result<Self, String> {
        let endpoint = Self::bind(address).map_err(|error| {
            format!("--metrics {address} can't be served: {error}; use another address or port")
        })?;
        log::info!("metrics: http://{}/metrics", endpoint.address());
        Ok(endpoint)
    }

    /// The address that it listens on; if port 0 was given, with the port that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves these metrics from now on, under names that begin with `prefix`.
    pub fn publish(&self, prefix: &str, figures: Box<dyn Collector>) {
        let mut registry = Registry::with_prefix(prefix);
        registry.register_collector(figures);
        let mut page = String::new();
        // Writing to a String does not fail.
        if text::encode(&mut page, &registry).is_ok() {
            *self.page.lock().unwrap_or_else(PoisonError::into_inner) = Arc::from(page);
        }
    }
}

/// Writes the metrics of a [`Collector`].
#[derive(Debug)]
pub struct Figures<'a>(pub DescriptorEncoder<'a>);

impl Figures<'_> {
    /// Writes a counter.
    ///
    /// # Errors
    /// The text can't be written.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, u64, u64>(&value, None)
    }

    /// Writes a counter for each label.
    ///
    /// # Errors
    /// The text can't be written.
    pub fn counters<'l>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Iterator<Item = (&'l str, u64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (text, value) in values {
            let labels = [(label, text)];
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, u64>(&value, None)?;
        }
        Ok(())
    }

    /// Writes a gauge; nothing if its value is not known.
    ///
    /// # Errors
    /// The text can't be written.
    pub fn gauge(&mut self, name: &str, help: &str, value: Option<f64>) -> fmt::Result {
        self.gauges(name, help, "", value.into_iter().map(|value| ("", value)))
    }

    /// Writes a gauge for each label.
    ///
    /// # Errors
    /// The text can't be written.
    pub fn gauges<'l>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl Iterator<Item = (&'l str, f64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (text, value) in values {
            if label.is_empty() {
                metric.encode_gauge(&value)?;
            } else {
                metric.encode_family(&[(label, text)])?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }
}

/// Reads a request and answers it.
fn answer(mut stream: TcpStream, page: &Mutex<Arc<str>>) -> io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_WITHIN))?;
    stream.set_write_timeout(Some(REQUEST_WITHIN))?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut buffer)?;
        if length == 0 || request.len() > REQUEST_BYTES_MAX {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..length]);
    }
    let (status, body): (_, Arc<str>) = if is_for_metrics(&request) {
        ("200 OK", Arc::clone(&page.lock().unwrap_or_else(PoisonError::into_inner)))
    } else {
        ("404 Not Found", Arc::from("the metrics are at /metrics\n"))
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

fn is_for_metrics(request: &[u8]) -> bool {
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let path = line.strip_prefix(b"GET ").and_then(|rest| rest.split(|&byte| byte == b' ').next());
    path.is_some_and(|path| path == b"/metrics" || path.starts_with(b"/metrics?"))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[derive(Debug)]
    struct Open(u64);

    impl Collector for Open {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
            let mut figures = Figures(encoder);
            figures.gauge("open", "Connections", Some(self.0 as f64))?;
            figures.gauge("unknown", "Nothing", None)?;
            figures.counter("accepted", "Connections", self.0)?;
            figures.counters("closed", "Connections", "reason", [("idle", 3)].into_iter())
        }
    }

    fn ask(endpoint: &Endpoint, request: &str) -> String {
        let mut stream = TcpStream::connect(endpoint.address()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_metrics_published_last_are_served() {
        let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        for open in [7, 8] {
            endpoint.publish("c1000k_test", Box::new(Open(open)));
            let answer = ask(&endpoint, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains(&format!("\nc1000k_test_open {open}.0\n")), "{answer}");
            assert!(answer.contains(&format!("\nc1000k_test_accepted_total {open}\n")), "{answer}");
            assert!(answer.contains("\nc1000k_test_closed_total{reason=\"idle\"} 3\n"), "{answer}");
            assert!(answer.ends_with("# EOF\n"), "{answer}");
        }
    }

    #[test]
    fn a_malformed_request_is_answered_and_breaks_nothing() {
        let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let too_long = "x".repeat(2 * REQUEST_BYTES_MAX);
        for (request, answer) in [
            ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
            ("GET /metrics?x HTTP/1.1\r\n\r\n", "HTTP/1.1 200"),
        ] {
            assert!(ask(&endpoint, request).starts_with(answer), "{request}");
        }
        let mut stream = TcpStream::connect(endpoint.address()).unwrap();
        let _ = stream.write_all(too_long.as_bytes());
        drop(stream);
        assert!(ask(&endpoint, "GET /metrics HTTP/1.0\r\n\r\n").contains("# EOF"));
    }
}
