//! Metrics for Prometheus, served by threads of their own: one accepts, and each request has another until it is answered.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// The timeout of a request with its answer.
const REQUEST_WITHIN: Duration = Duration::from_secs(2);
/// The pause if accepting fails, for example without a free descriptor.
const PAUSE: Duration = Duration::from_millis(100);
/// The maximum length of a request.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// The maximum of connections at once. More of them wait until the oldest is answered or has timed out.
const CONNECTIONS_MAX: usize = 16;
/// Enough for the request and the head of its answer.
const STACK_BYTES: usize = 64 * 1024;
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves the metrics that were published last at `/metrics`.
#[derive(Clone, Debug)]
pub struct Endpoint {
    page: Arc<Mutex<Arc<str>>>,
    address: SocketAddr,
}

impl Endpoint {
    /// Listens on the address. All signals are blocked in its threads.
    ///
    /// # Errors
    /// The address can't be bound, or no thread can be started.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let page = Arc::new(Mutex::new(Arc::from("# EOF\n")));
        let shared = Arc::clone(&page);
        let serve = move || {
            let mut answering = VecDeque::new();
            loop {
                match listener.accept() {
                    Ok((stream, _)) => answering.extend(start_answer(stream, &shared)),
                    Err(_) => thread::sleep(PAUSE),
                }
                answering.retain(|thread: &JoinHandle<()>| !thread.is_finished());
                if answering.len() >= CONNECTIONS_MAX
                    && let Some(oldest) = answering.pop_front()
                {
                    let _ = oldest.join();
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

/// Answers in a new thread; in this one, if none can be started. It is no error if the reader closes the connection
/// early.
fn start_answer(stream: TcpStream, page: &Arc<Mutex<Arc<str>>>) -> Option<JoinHandle<()>> {
    let (stream, page) = (Arc::new(stream), Arc::clone(page));
    let theirs = (Arc::clone(&stream), Arc::clone(&page));
    let started = thread::Builder::new()
        .name("metrics".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || _ = answer(&theirs.0, &theirs.1));
    started.inspect_err(|_| _ = answer(&stream, &page)).ok()
}

/// Reads a request and answers it.
fn answer(mut stream: &TcpStream, page: &Mutex<Arc<str>>) -> io::Result<()> {
    let deadline = Instant::now() + REQUEST_WITHIN;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        stream.set_read_timeout(Some(until(deadline)?))?;
        let length = stream.read(&mut buffer)?;
        if length == 0 || request.len() > REQUEST_BYTES_MAX {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..length]);
    }
    let method = method_for_metrics(&request);
    let (status, body): (_, Arc<str>) = if method.is_some() {
        ("200 OK", Arc::clone(&page.lock().unwrap_or_else(PoisonError::into_inner)))
    } else {
        ("404 Not Found", Arc::from("the metrics are at /metrics\n"))
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    write_until(deadline, stream, head.as_bytes())?;
    if method == Some(Method::Head) {
        return Ok(());
    }
    write_until(deadline, stream, body.as_bytes())
}

/// The time that is left.
fn until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn write_until(deadline: Instant, mut stream: &TcpStream, mut text: &[u8]) -> io::Result<()> {
    while !text.is_empty() {
        stream.set_write_timeout(Some(until(deadline)?))?;
        match stream.write(text) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => text = &text[length..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A method of a request for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Get,
    Head,
}

/// `None` if the request is for something else.
fn method_for_metrics(request: &[u8]) -> Option<Method> {
    let line = request.split(|&byte| byte == b'\r').next()?;
    let mut words = line.split(|&byte| byte == b' ');
    let method = match words.next()? {
        b"GET" => Method::Get,
        b"HEAD" => Method::Head,
        _ => return None,
    };
    let path = words.next()?;
    (path == b"/metrics" || path.starts_with(b"/metrics?")).then_some(method)
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
    fn idle_connections_do_not_block_a_request() {
        let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let connect = || TcpStream::connect(endpoint.address()).unwrap();
        let began = Instant::now();
        let _idle: Vec<_> = (0..CONNECTIONS_MAX - 1).map(|_| connect()).collect();
        assert!(ask(&endpoint, "GET /metrics HTTP/1.1\r\n\r\n").ends_with("# EOF\n"));
        assert!(began.elapsed() < REQUEST_WITHIN, "{:?}", began.elapsed());
    }

    #[test]
    fn more_connections_than_the_maximum_wait_for_one_timeout() {
        let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let began = Instant::now();
        let mut idle: Vec<_> =
            (0..CONNECTIONS_MAX).map(|_| TcpStream::connect(endpoint.address()).unwrap()).collect();
        assert!(ask(&endpoint, "GET /metrics HTTP/1.1\r\n\r\n").ends_with("# EOF\n"));
        assert!(began.elapsed() >= REQUEST_WITHIN.mul_f64(0.9), "{:?}", began.elapsed());
        for stream in &mut idle {
            assert_eq!(stream.read(&mut [0]).unwrap(), 0, "it was closed");
        }
        assert!(began.elapsed() < REQUEST_WITHIN * 3, "{:?}", began.elapsed());
    }

    #[test]
    fn a_request_that_drips_is_closed_in_time() {
        let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let mut stream = TcpStream::connect(endpoint.address()).unwrap();
        stream.set_read_timeout(Some(REQUEST_WITHIN / 8)).unwrap();
        let began = Instant::now();
        let is_open = |stream: &mut TcpStream| {
            let sent = stream.write(b"x").is_ok();
            let read = stream.read(&mut [0]).map_err(|error| error.kind());
            sent && read == Err(io::ErrorKind::WouldBlock)
        };
        while is_open(&mut stream) {
            assert!(began.elapsed() < REQUEST_WITHIN * 3);
        }
    }

    #[test]
    fn the_head_alone_has_no_body() {
        let endpoint = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let answer = ask(&endpoint, "HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("\r\nContent-Length: 6\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n"), "{answer}");
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
