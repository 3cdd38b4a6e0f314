/// Why a packet was dropped. The flow log, the metrics and the CLI print these very words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum DropReason {
    /// No policy of the sender allows it.
    EgressDenied = 1,
    /// No policy of the receiver allows it.
    IngressDenied = 2,
    /// A row or a table that must exist does not: nothing is allowed until it is programmed.
    PolicyMissing = 3,
    /// The source MAC or IP address is not the endpoint's own, or ARP/ND claims another's.
    Spoofed = 4,
    /// Headers that are cut short or contradict each other.
    Malformed = 5,
    /// A protocol that may not leave an endpoint (router advertisement, redirect, non-IP frames).
    ForbiddenProtocol = 6,
    /// A fragment whose first fragment was not seen, or a first fragment without its L4 header.
    FragmentWithoutFirst = 7,
    /// The flow table is full.
    FlowTableFull = 8,
    /// The Service has no backend.
    NoBackend = 9,
    /// A packet that can only belong to a flow, without that flow.
    NoFlow = 10,
    /// A translated flow would collide with one that exists.
    TranslationCollision = 11,
    /// The interface belongs to no known endpoint.
    UnknownEndpoint = 12,
    /// Rewriting or redirecting the packet failed in the kernel.
    Internal = 13,
    /// The proxy has to see the traffic, and this went round it.
    ProxyBypassed = 14,
    /// The proxy has to see the traffic, and it does not listen.
    ProxyGone = 15,
    /// It would leave with a pod's address, and the node's cannot stand for it.
    NotMasqueraded = 16,
    /// The table of masqueraded TCP flows is full.
    MasqueradeTableFull = 17,
    /// The endpoint has as many TCP flows as one may have.
    TooManyFlows = 18,
    /// The endpoint asks name servers faster than one may ask through the proxy.
    TooManyQuestions = 19,
}

impl DropReason {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 19] = [
        Self::EgressDenied,
        Self::IngressDenied,
        Self::PolicyMissing,
        Self::Spoofed,
        Self::Malformed,
        Self::ForbiddenProtocol,
        Self::FragmentWithoutFirst,
        Self::FlowTableFull,
        Self::NoBackend,
        Self::NoFlow,
        Self::TranslationCollision,
        Self::UnknownEndpoint,
        Self::Internal,
        Self::ProxyBypassed,
        Self::ProxyGone,
        Self::NotMasqueraded,
        Self::MasqueradeTableFull,
        Self::TooManyFlows,
        Self::TooManyQuestions,
    ];

    /// The reason with this number; none for a number that no program of this version writes.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).wrapping_sub(1)).copied()
    }

    /// Words for people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EgressDenied => "egress policy denied",
            Self::IngressDenied => "ingress policy denied",
            Self::PolicyMissing => "policy not yet programmed",
            Self::Spoofed => "spoofed source",
            Self::Malformed => "malformed packet",
            Self::ForbiddenProtocol => "forbidden protocol",
            Self::FragmentWithoutFirst => "fragment without its first",
            Self::FlowTableFull => "flow table full",
            Self::NoBackend => "service has no backend",
            Self::NoFlow => "no such flow",
            Self::TranslationCollision => "translation collision",
            Self::UnknownEndpoint => "unknown endpoint",
            Self::Internal => "internal error",
            Self::ProxyBypassed => "proxy bypassed",
            Self::ProxyGone => "proxy not running",
            Self::NotMasqueraded => "cannot be masqueraded",
            Self::MasqueradeTableFull => "masquerade table full",
            Self::TooManyFlows => "too many flows of one endpoint",
            Self::TooManyQuestions => "too many questions of one endpoint",
        }
    }
}
