//! TCP segments in IPv4 packets.

use std::net::SocketAddrV4;

use etherparse::{
    IpNumber, Ipv4Header, NetSlice, SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice,
};

/// The longest payload of one segment: the MTU of Ethernet without the headers.
pub(crate) const PAYLOAD_MAX: usize = 1_460;

/// The advertised window; the client reads everything at once.
const WINDOW: u16 = u16::MAX;

const TTL: u8 = 64;

/// One segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment<'a> {
    pub(crate) source: SocketAddrV4,
    pub(crate) destination: SocketAddrV4,
    pub(crate) sequence: u32,
    /// `None`: without an acknowledgment.
    pub(crate) acknowledgment: Option<u32>,
    pub(crate) flags: Flags,
    pub(crate) payload: &'a [u8],
}

/// The flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
}

impl<'a> Segment<'a> {
    /// Reads a packet; `None` if it is not a complete TCP segment, or its checksum is wrong.
    pub(crate) fn parse(packet: &'a [u8]) -> Option<Self> {
        let sliced = SlicedPacket::from_ip(packet).ok()?;
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
            (sliced.net, sliced.transport)
        else {
            return None;
        };
        let header = ip.header();
        let expected = tcp.calc_checksum_ipv4(header.source(), header.destination()).ok()?;
        if ip.is_payload_fragmented() || !are_same(tcp.checksum(), expected) {
            return None;
        }
        Some(Self {
            source: SocketAddrV4::new(header.source_addr(), tcp.source_port()),
            destination: SocketAddrV4::new(header.destination_addr(), tcp.destination_port()),
            sequence: tcp.sequence_number(),
            acknowledgment: tcp.ack().then(|| tcp.acknowledgment_number()),
            flags: Flags { syn: tcp.syn(), fin: tcp.fin(), rst: tcp.rst() },
            payload: tcp.payload(),
        })
    }

    /// The sequence numbers that it occupies.
    pub(crate) fn length(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.flags.syn) + u32::from(self.flags.fin)
    }

    /// Replaces the contents of `packet`. A SYN has the option MSS; no other segment has options.
    pub(crate) fn write(&self, packet: &mut Vec<u8>) {
        packet.clear();
        let (source, destination) = (self.source, self.destination);
        let mut tcp = TcpHeader::new(source.port(), destination.port(), self.sequence, WINDOW);
        tcp.ack = self.acknowledgment.is_some();
        tcp.acknowledgment_number = self.acknowledgment.unwrap_or(0);
        (tcp.syn, tcp.fin, tcp.rst) = (self.flags.syn, self.flags.fin, self.flags.rst);
        tcp.psh = !self.payload.is_empty();
        if self.flags.syn {
            // Four bytes always fit.
            let _ = tcp.set_options(&[TcpOptionElement::MaximumSegmentSize(PAYLOAD_MAX as u16)]);
        }
        let length = tcp.header_len() + self.payload.len();
        // A payload of at most PAYLOAD_MAX always fits.
        let Ok(mut ip) = Ipv4Header::new(
            length as u16,
            TTL,
            IpNumber::TCP,
            source.ip().octets(),
            destination.ip().octets(),
        ) else {
            return;
        };
        ip.dont_fragment = true;
        ip.header_checksum = ip.calc_header_checksum();
        tcp.checksum = tcp.calc_checksum_ipv4(&ip, self.payload).unwrap_or(0);
        packet.extend_from_slice(&ip.to_bytes());
        packet.extend_from_slice(&tcp.to_bytes());
        packet.extend_from_slice(self.payload);
    }
}

/// Zero has two forms in one's complement.
fn are_same(checksum: u16, other: u16) -> bool {
    checksum == other || [checksum, other].into_iter().all(|sum| matches!(sum, 0 | u16::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(payload: &[u8]) -> Segment<'_> {
        Segment {
            source: "198.18.0.2:1024".parse().unwrap(),
            destination: "198.18.0.1:9900".parse().unwrap(),
            sequence: u32::MAX,
            acknowledgment: Some(7),
            flags: Flags::default(),
            payload,
        }
    }

    #[test]
    fn the_option_of_a_syn_is_its_mss() {
        let mut packet = vec![];
        let flags = Flags { syn: true, ..Flags::default() };
        Segment { acknowledgment: None, flags, ..segment(b"") }.write(&mut packet);
        assert_eq!(packet[40..], [2, 4, 5, 180], "MSS 1460 and nothing else");
        assert_eq!(packet.len(), 44);
        segment(b"hello").write(&mut packet);
        assert_eq!(packet.len(), 45);
    }

    #[test]
    fn a_flipped_bit_of_a_segment_is_detected() {
        let mut packet = vec![];
        segment(b"hello").write(&mut packet);
        assert!(Segment::parse(&packet).is_some());
        for bit in 20 * 8..packet.len() * 8 {
            let mut flipped = packet.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Segment::parse(&flipped), None, "bit {bit}");
        }
    }

    #[test]
    fn both_forms_of_a_checksum_of_zero_are_right() {
        let mut packet = vec![];
        let checksum = |packet: &[u8]| u16::from_be_bytes([packet[36], packet[37]]);
        let zero = (0..=u32::from(u16::MAX)).find(|&sequence| {
            Segment { sequence, ..segment(b"") }.write(&mut packet);
            matches!(checksum(&packet), 0 | u16::MAX)
        });
        assert!(zero.is_some());
        for form in [[0; 2], [u8::MAX; 2]] {
            packet[36..38].copy_from_slice(&form);
            assert!(Segment::parse(&packet).is_some(), "{form:?}");
        }
        packet[37] = 1;
        assert_eq!(Segment::parse(&packet), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            payload in proptest::collection::vec(any::<u8>(), 0..=PAYLOAD_MAX),
            sequence in any::<u32>(),
            acknowledgment in any::<Option<u32>>(),
            [syn, fin, rst] in any::<[bool; 3]>(),
        ) {
            let written =
                Segment { sequence, acknowledgment, flags: Flags { syn, fin, rst }, ..segment(&payload) };
            let mut packet = vec![];
            written.write(&mut packet);
            prop_assert_eq!(Segment::parse(&packet), Some(written));
        }

        #[test]
        fn no_bytes_break_it(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Segment::parse(&packet);
        }
    }
}
