// What TensorRT's own ONNX parser, of version 8.5 or 10 and later, makes of a graph, found out without a GPU.
//
// TensorRT's builder wants a GPU before it gives out a network; its parser does not, it only calls the network that it
// is given.  This is one: it follows shapes and types as far as the parser asks for them, objects to layers that
// TensorRT would refuse, and writes down what it was told, so that check.py can run it with ONNX Runtime.  From version
// 10 on it is strongly typed: what has several inputs wants them of one type, and no type may be set from outside.
//
//     network OUTPUT GRAPH.onnx      writes OUTPUT.json and OUTPUT.bin (the weights); the exit code is 1 if it fails
//
// Proves: the real parser takes the graph, names and types its layers as told, and means by it what ONNX means.
// Does not: that the builder finds kernels for it, how fast they are, or how exact in float16.
//
// Where functions of AnyLayer and Tensor lack `override`, it is because version 11 has lost them.

#include "defaults.h" // made by build.py from NvInferImpl.h: every class with functions that end the program

#include <algorithm>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <vector>

using namespace nvinfer1;
using namespace nvinfer1::apiv;
using Numbers = std::vector<double>;
#define HAS_ATTENTION (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1015) // and addNormalizationV2
using Size = std::remove_all_extents_t<decltype(Dims::d)>; // 32 bits, and 64 from version 10 on

#if NV_TENSORRT_MAJOR < 10
using Given = Dims; // how functions take dimensions
static constexpr bool STRONG = false; // typed by the graph alone
static constexpr auto INT64 = DataType(-1), BFLOAT16 = DataType(-1), SHAPES = DataType::kINT32;
#else
using Given = Dims const&;
static constexpr bool STRONG = true;
static constexpr auto INT64 = DataType::kINT64, BFLOAT16 = DataType::kBF16, SHAPES = INT64;
using ResizeMode = InterpolationMode;
using SliceMode = SampleMode;
#endif

static std::vector<std::string> objections;
static std::string parsing; // the node that the parser is at
static std::ofstream weights_file;
static int64_t weights_size;

static void object(std::string const& what) { objections.push_back(parsing + ": " + what); }

static Dims dims_of(std::vector<Size> const& sizes)
{
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}
static std::vector<Size> sizes_of(Dims const& dims) { return {dims.d, dims.d + dims.nbDims}; }
static std::string text(Dims const& dims)
{
    std::string out;
    for (Size size : sizes_of(dims))
        out += (out.empty() ? "(" : ", ") + std::to_string(size);
    return (out.empty() ? "(" : out) + ")";
}
static size_t bytes_of(DataType type)
{
    if (STRONG && type == INT64)
        return 8;
    if (type == DataType::kHALF || (STRONG && type == BFLOAT16))
        return 2;
    return type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 1;
}
static bool is_integer(DataType type) { return type == DataType::kINT32 || (STRONG && type == INT64); }
static bool is_float(DataType type) { return !is_integer(type) && bytes_of(type) > 1; }

// As as_onnx.py knows the kinds of layers, whose numbers differ between versions.
static char const* word(LayerType kind)
{
    switch (kind) {
    case LayerType::kACTIVATION: return "activation";
    case LayerType::kCONCATENATION: return "concatenation";
    case LayerType::kCONSTANT: return "constant";
    case LayerType::kCONVOLUTION: return "convolution";
    case LayerType::kELEMENTWISE: return "elementwise";
    case LayerType::kGATHER: return "gather";
    case LayerType::kIDENTITY: return "identity";
    case LayerType::kMATRIX_MULTIPLY: return "product";
    case LayerType::kREDUCE: return "reduction";
    case LayerType::kRESIZE: return "resize";
    case LayerType::kSELECT: return "choice";
    case LayerType::kSHAPE: return "shape";
    case LayerType::kSHUFFLE: return "shuffle";
    case LayerType::kSLICE: return "slice";
    case LayerType::kSOFTMAX: return "softmax";
    case LayerType::kUNARY: return "unary";
#if NV_TENSORRT_MAJOR >= 10
    case LayerType::kCAST: return "cast";
    case LayerType::kNORMALIZATION: return "normalization";
    case LayerType::kSQUEEZE: return "squeeze";
    case LayerType::kUNSQUEEZE: return "unsqueeze";
#endif
#if HAS_ATTENTION
    case LayerType::kATTENTION_INPUT: return "attention";
#endif
    default: return "other";
    }
}

// ---- tensors and layers -------------------------------------------------------------------------------------------

static std::vector<struct Tensor*> tensors;

struct Tensor final : ITensor, mock::DVTensor
{
    size_t const id = tensors.size();
    std::string name;
    Dims dims{};
    DataType type = DataType::kFLOAT;
    bool input = false, output = false, has_values = false;
    std::vector<Size> values; // of a shape; -1: not known before the engine runs

    Tensor() { mImpl = this, tensors.push_back(this); }
    void setName(char const* given) noexcept override { name = given; }
    char const* getName() const noexcept override { return name.c_str(); }
    Dims getDimensions() const noexcept override { return dims; }
    DataType getType() const noexcept override { return type; }
    void setType(DataType told) noexcept { type = told; }
    bool isNetworkInput() const noexcept override { return input; }
    bool isNetworkOutput() const noexcept override { return output; }
    bool isShapeTensor() const noexcept override { return has_values; }
    TensorLocation getLocation() const noexcept override { return TensorLocation::kDEVICE; }
    bool dynamicRangeIsSet() const noexcept { return false; }
    void know(std::vector<Size> const& known) { values = known, has_values = true; }
};
static Tensor& own(ITensor* tensor) { return static_cast<Tensor&>(*tensor); }

struct AnyLayer : mock::DVLayer
{
    LayerType kind;
    std::string name;
    std::vector<ITensor*> inputs;
    Tensor output;
    std::map<std::string, Numbers> told;
    std::map<std::string, Weights> weights;
    std::function<void()> infer = [] {};

    Dims in(size_t place) const { return own(inputs[place]).dims; }
    void tell(std::string const& what, Numbers const& numbers) { told[what] = numbers, infer(); }
    void tell_dims(std::string const& what, Dims const& dims)
    {
        tell(what, Numbers(dims.d, dims.d + std::max(0, dims.nbDims))); // below 0: not known yet
    }
    Numbers& heard(std::string const& what) { return told.at(what); }

    LayerType getType() const noexcept override { return kind; }
    void setName(char const* given) noexcept override { name = given; }
    char const* getName() const noexcept override { return name.c_str(); }
    int32_t getNbInputs() const noexcept override { return static_cast<int32_t>(inputs.size()); }
    ITensor* getInput(int32_t place) const noexcept override { return inputs.at(place); }
    int32_t getNbOutputs() const noexcept override { return 1; }
    ITensor* getOutput(int32_t) const noexcept override { return const_cast<Tensor*>(&output); }
    void setOutputType(int32_t, DataType type) noexcept
    {
        output.type = type;
        if (STRONG)
            object("a type that is not the graph's");
    }
    bool outputTypeIsSet(int32_t) const noexcept { return false; }
    bool precisionIsSet() const noexcept { return false; }
    void setInput(int32_t place, ITensor& tensor) noexcept override
    {
        inputs.resize(std::max<size_t>(inputs.size(), place + 1));
        inputs[place] = &tensor;
        infer();
    }
};

template <class Interface, class Default>
struct Layer : Interface, Default, AnyLayer
{
    Layer(LayerType type, std::vector<ITensor*> const& given)
    {
        this->mImpl = this, this->mLayer = this;
        for (ITensor* tensor : given)
            if (tensor->getType() == DataType::kUINT8)
                object("bytes other than as an output");
        kind = type, inputs = given;
        if (!given.empty())
            output.type = given[0]->getType(), output.dims = in(0);
    }
};

static Dims broadcast(Dims one, Dims const& other)
{
    if (one.nbDims != other.nbDims)
        object("ranks differ: " + text(one) + " and " + text(other));
    for (int32_t i = 0; i < std::min(one.nbDims, other.nbDims); i++) {
        if (one.d[i] > 1 && other.d[i] > 1 && one.d[i] != other.d[i])
            object("shapes differ: " + text(one) + " and " + text(other));
        one.d[i] = one.d[i] == 1 || (one.d[i] < 0 && other.d[i] > 1) ? other.d[i] : one.d[i];
    }
    return one;
}

// ---- layers whose shapes need more than a line --------------------------------------------------------------------

struct Shuffle final : Layer<IShuffleLayer, mock::DVShuffleLayer>
{
    Permutation first{}, second{};
    bool zero_is_placeholder = true;

    explicit Shuffle(ITensor& tensor) : Layer(LayerType::kSHUFFLE, {&tensor})
    {
        for (int32_t i = 0; i < Dims::MAX_DIMS; i++)
            first.order[i] = second.order[i] = i;
        infer = [this] { output.dims = permuted(reshaped(permuted(in(0), first)), second), pass_values(); };
        infer();
    }
    static Dims permuted(Dims const& dims, Permutation const& order)
    {
        Dims out = dims;
        for (int32_t i = 0; i < dims.nbDims; i++)
            out.d[i] = dims.d[order.order[i]];
        return out;
    }
    Dims reshaped(Dims const& dims)
    {
        if (inputs.size() > 1) {
            Tensor& shape = own(inputs[1]);
            if (!is_integer(shape.type) || shape.dims.nbDims != 1 || shape.dims.d[0] < 0)
                object("a shape of type or rank unknown");
            Dims out = dims_of(shape.has_values ? shape.values : std::vector<Size>(shape.dims.d[0], -1));
            for (int32_t i = 0; zero_is_placeholder && i < std::min(out.nbDims, dims.nbDims); i++)
                out.d[i] = out.d[i] ? out.d[i] : dims.d[i];
            return out;
        }
        if (!told.count("reshape"))
            return dims;
        Dims out = dims_of({heard("reshape").begin(), heard("reshape").end()});
        int64_t volume = 1, known = 1;
        int32_t wildcard = -1;
        bool exact = true;
        for (Size size : sizes_of(dims))
            exact &= size >= 0, volume *= size;
        for (int32_t i = 0; i < out.nbDims; i++) {
            if (out.d[i] == 0 && zero_is_placeholder)
                out.d[i] = dims.d[i];
            else if (out.d[i] == -1)
                wildcard = i;
            known *= i == wildcard ? 1 : out.d[i];
        }
        if (exact && (wildcard < 0 ? known != volume : !known || volume % known))
            object("cannot reshape " + text(dims) + " to " + text(out));
        if (exact && wildcard >= 0 && known)
            out.d[wildcard] = static_cast<Size>(volume / known);
        return out;
    }
    void pass_values()
    {
        if (own(inputs[0]).has_values && output.dims.nbDims <= 1)
            output.know(own(inputs[0]).values);
    }
    void setFirstTranspose(Permutation const& order) noexcept override
    {
        first = order;
        tell("first", Numbers(order.order, order.order + in(0).nbDims));
    }
    void setSecondTranspose(Permutation const& order) noexcept override
    {
        second = order;
        tell("second", Numbers(order.order, order.order + output.dims.nbDims));
    }
    void setReshapeDimensions(Given dims) noexcept override { tell_dims("reshape", dims); }
    void setZeroIsPlaceholder(bool on) noexcept override { zero_is_placeholder = on, tell("zero", {double(on)}); }
    bool getZeroIsPlaceholder() const noexcept override { return zero_is_placeholder; }
};

struct Slice final : Layer<ISliceLayer, mock::DVSliceLayer>
{
    Slice(ITensor& tensor, Dims start, Dims size, Dims stride) : Layer(LayerType::kSLICE, {&tensor})
    {
        tell_dims("start", start), tell_dims("size", size), tell_dims("stride", stride);
        infer = [this] {
            Tensor& source = own(inputs[0]);
            Numbers const from = setting("start", 1), size = setting("size", 2), by = setting("stride", 3);
            output.dims = in(0);
            for (int32_t i = 0; i < output.dims.nbDims; i++)
                output.dims.d[i] = size_t(i) < size.size() ? Size(size[i]) : -1;
            if (!source.has_values || from.size() != 1 || size.size() != 1 || by.size() != 1)
                return;
            std::vector<Size> part;
            for (double i = 0; i < size[0]; i++) {
                double place = from[0] + i * by[0];
                bool inside = place >= 0 && place < double(source.values.size());
                part.push_back(inside ? source.values[size_t(place)] : -1);
            }
            output.know(part);
        };
        infer();
    }
    // As told, or from a tensor in its place; empty if that is not known.
    Numbers setting(std::string const& what, size_t place)
    {
        if (inputs.size() <= place || !inputs[place])
            return heard(what);
        Tensor const& tensor = own(inputs[place]);
        return Numbers(tensor.values.begin(), tensor.values.end());
    }
    void setStart(Given dims) noexcept override { tell_dims("start", dims); }
    void setSize(Given dims) noexcept override { tell_dims("size", dims); }
    void setStride(Given dims) noexcept override { tell_dims("stride", dims); }
    void setMode(SliceMode mode) noexcept override { tell("mode", {double(mode)}); }
};

struct Convolution final : Layer<IConvolutionLayer, mock::DVConvolutionLayer>
{
    Convolution(ITensor& tensor, Size maps, Dims kernel, Weights given, Weights bias)
        : Layer(LayerType::kCONVOLUTION, {&tensor})
    {
        Dims ones = kernel, none = kernel;
        std::fill(ones.d, ones.d + ones.nbDims, 1), std::fill(none.d, none.d + none.nbDims, 0);
        weights = {{"kernel", given}, {"bias", bias}};
        if (STRONG && given.count && (given.type != tensor.getType() || (bias.count && bias.type != given.type)))
            object("a convolution with weights of another type");
        tell_dims("kernel", kernel), tell_dims("stride", ones), tell_dims("dilation", ones);
        tell_dims("before", none), tell_dims("after", none);
        tell("groups", {1.0}), tell("maps", {double(maps)});
        infer = [this] {
            Dims out = in(0);
            double volume = heard("maps")[0] * out.d[1] / heard("groups")[0];
            for (size_t i = 0; i < heard("kernel").size(); i++) {
                double span = heard("dilation")[i] * (heard("kernel")[i] - 1) + 1;
                double padded = out.d[2 + i] + heard("before")[i] + heard("after")[i];
                volume *= heard("kernel")[i];
                out.d[2 + i] = out.d[2 + i] < 0 ? -1 : Size((padded - span) / heard("stride")[i]) + 1;
            }
            if (weights["kernel"].count && volume != double(weights["kernel"].count)) // else it is a tensor
                object("convolution of " + text(out) + ", whose channels are not known or not those of the weights");
            out.d[1] = Size(heard("maps")[0]);
            output.dims = out;
        };
    }
    void setStrideNd(Given dims) noexcept override { tell_dims("stride", dims); }
    void setDilationNd(Given dims) noexcept override { tell_dims("dilation", dims); }
    void setPrePadding(Given dims) noexcept override { tell_dims("before", dims); }
    void setPostPadding(Given dims) noexcept override { tell_dims("after", dims); }
    void setNbGroups(Size groups) noexcept override { tell("groups", {double(groups)}); }
};

struct Resize final : Layer<IResizeLayer, mock::DVResizeLayer>
{
    explicit Resize(ITensor& tensor) : Layer(LayerType::kRESIZE, {&tensor})
    {
        if (STRONG && tensor.getType() == BFLOAT16)
            object("a resize in bfloat16, for which there are no kernels");
        infer = [this] {
            for (int32_t i = 0; i < in(0).nbDims; i++) {
                Size size = in(0).d[i];
                if (inputs.size() > 1)
                    output.dims.d[i] = own(inputs[1]).has_values ? own(inputs[1]).values.at(i) : -1;
                else if (told.count("scales"))
                    output.dims.d[i] = size < 0 ? -1 : Size(size * heard("scales").at(i));
            }
        };
    }
    void setScales(float const* scales, int32_t count) noexcept override { tell("scales", {scales, scales + count}); }
    void setResizeMode(ResizeMode mode) noexcept override { tell("mode", {double(mode)}); }
    void setCoordinateTransformation(ResizeCoordinateTransformation way) noexcept override
    {
        tell("coordinates", {double(way)});
    }
    void setNearestRounding(ResizeRoundMode mode) noexcept override { tell("rounding", {double(mode)}); }
};

struct Concatenation final : Layer<IConcatenationLayer, mock::DVConcatenationLayer>
{
    explicit Concatenation(std::vector<ITensor*> const& given) : Layer(LayerType::kCONCATENATION, given)
    {
        tell("axis", {double(std::max(0, in(0).nbDims - 3))});
        infer = [this] {
            Size axis = Size(heard("axis")[0]), sum = 0;
            std::vector<Size> values;
            bool known = true;
            for (size_t i = 0; i < inputs.size(); i++) {
                if (in(i).nbDims != in(0).nbDims || inputs[i]->getType() != inputs[0]->getType())
                    object("cannot concatenate " + text(in(0)) + " and " + text(in(i)) + ", or their types");
                sum = sum < 0 || in(i).d[axis] < 0 ? -1 : sum + in(i).d[axis];
                known &= own(inputs[i]).has_values;
                values.insert(values.end(), own(inputs[i]).values.begin(), own(inputs[i]).values.end());
            }
            output.dims = in(0), output.dims.d[axis] = sum;
            if (known)
                output.know(values);
        };
        infer();
    }
    void setAxis(int32_t axis) noexcept override { tell("axis", {double(axis)}); }
};

struct Gather final : Layer<IGatherLayer, mock::DVGatherLayer>
{
    Gather(ITensor& data, ITensor& indices, int32_t axis) : Layer(LayerType::kGATHER, {&data, &indices})
    {
        if (!is_integer(indices.getType()))
            object("indices that are no integers");
        infer = [this] {
            std::vector<Size> sizes = sizes_of(in(0)), rows = sizes_of(in(1));
            auto place = sizes.erase(sizes.begin() + int32_t(heard("axis")[0]));
            sizes.insert(place, rows.begin(), rows.end());
            output.dims = dims_of(sizes);
            Tensor &table = own(inputs[0]), &chosen = own(inputs[1]);
            if (!table.has_values || !chosen.has_values)
                return;
            std::vector<Size> found;
            for (Size index : chosen.values)
                found.push_back(index < 0 ? -1 : table.values.at(index));
            output.know(found);
        };
        tell("axis", {double(axis)});
    }
    void setGatherAxis(int32_t axis) noexcept override { tell("axis", {double(axis)}); }
    void setNbElementWiseDims(int32_t count) noexcept override
    {
        if (count)
            object("a gather by element");
    }
};

struct MatrixMultiply final : Layer<IMatrixMultiplyLayer, mock::DVMatrixMultiplyLayer>
{
    MatrixMultiply(ITensor& a, MatrixOperation how_a, ITensor& b, MatrixOperation how_b)
        : Layer(LayerType::kMATRIX_MULTIPLY, {&a, &b})
    {
        if (a.getType() != b.getType() || !is_float(a.getType()))
            object("a product of two types, or of integers");
        Dims left = in(0), right = in(1);
        int32_t last = left.nbDims - 1;
        if (how_a == MatrixOperation::kTRANSPOSE)
            std::swap(left.d[last], left.d[last - 1]);
        if (how_b == MatrixOperation::kTRANSPOSE)
            std::swap(right.d[last], right.d[last - 1]);
        Size rows = left.d[last - 1], columns = right.d[last];
        if (left.d[last] != right.d[last - 1] && left.d[last] >= 0 && right.d[last - 1] >= 0)
            object("cannot multiply " + text(left) + " and " + text(right));
        left.d[last - 1] = left.d[last] = right.d[last - 1] = right.d[last] = 1;
        output.dims = broadcast(left, right);
        output.dims.d[last - 1] = rows, output.dims.d[last] = columns;
        tell("operations", {double(how_a), double(how_b)});
    }
};

struct ElementWise final : Layer<IElementWiseLayer, mock::DVElementWiseLayer>
{
    ElementWise(ITensor& a, ITensor& b, ElementWiseOperation operation) : Layer(LayerType::kELEMENTWISE, {&a, &b})
    {
        if (a.getType() != b.getType())
            object("arithmetic on two types");
        output.dims = broadcast(in(0), in(1));
        tell("operation", {double(operation)});
        std::vector<Size> const &one = own(&a).values, &other = own(&b).values;
        if (own(&a).has_values && own(&b).has_values && one.size() == other.size())
            pass_values(operation, one, other);
    }
    void pass_values(ElementWiseOperation operation, std::vector<Size> const& one, std::vector<Size> const& other)
    {
        std::vector<Size> result;
        for (size_t i = 0; i < one.size(); i++)
            result.push_back(one[i] < 0 || other[i] < 0 ? -1 : value(operation, one[i], other[i]));
        output.know(result);
    }
    static Size value(ElementWiseOperation operation, Size one, Size other)
    {
        switch (operation) {
        case ElementWiseOperation::kSUM: return one + other;
        case ElementWiseOperation::kSUB: return one - other;
        case ElementWiseOperation::kPROD: return one * other;
        case ElementWiseOperation::kMAX: return std::max(one, other);
        case ElementWiseOperation::kMIN: return std::min(one, other);
        case ElementWiseOperation::kFLOOR_DIV: return other ? one / other : -1;
        default: return -1;
        }
    }
};

struct SoftMax final : Layer<ISoftMaxLayer, mock::DVSoftMaxLayer>
{
    explicit SoftMax(ITensor& tensor) : Layer(LayerType::kSOFTMAX, {&tensor}) {}
    void setAxes(uint32_t axes) noexcept override { tell("axes", {double(axes)}); }
};

#if NV_TENSORRT_MAJOR >= 10
#include "since_10.h"
#endif

// ---- the network --------------------------------------------------------------------------------------------------

struct Network final : INetworkDefinition, mock::DVNetworkDefinition
{
    std::vector<AnyLayer*> layers;
    std::vector<Tensor*> inputs, outputs;

    Network() { mImpl = this; }
    template <class Kind>
    Kind* keep(Kind* layer)
    {
        layers.push_back(layer);
        return layer;
    }
    template <class Interface, class Default>
    Layer<Interface, Default>* plain(LayerType kind, std::vector<ITensor*> const& given)
    {
        return keep(new Layer<Interface, Default>(kind, given));
    }

    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool hasImplicitBatchDimension() const noexcept { return false; }
    bool setWeightsName(Weights, char const*) noexcept override { return true; }
    int32_t getNbLayers() const noexcept override { return static_cast<int32_t>(layers.size()); }
    int32_t getNbInputs() const noexcept override { return static_cast<int32_t>(inputs.size()); }
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(outputs.size()); }
    ITensor* getInput(int32_t place) const noexcept override { return inputs.at(place); }
    ITensor* getOutput(int32_t place) const noexcept override { return outputs.at(place); }
    ITensor* addInput(char const* name, DataType type, Given dims) noexcept override
    {
        auto tensor = new Tensor;
        tensor->name = name, tensor->type = type, tensor->dims = dims, tensor->input = true;
        inputs.push_back(tensor);
        return tensor;
    }
    void markOutput(ITensor& tensor) noexcept override
    {
        own(&tensor).output = true;
        outputs.push_back(&own(&tensor));
    }

    IShuffleLayer* addShuffle(ITensor& tensor) noexcept override { return keep(new Shuffle(tensor)); }
    IResizeLayer* addResize(ITensor& tensor) noexcept override { return keep(new Resize(tensor)); }
    ISoftMaxLayer* addSoftMax(ITensor& tensor) noexcept override { return keep(new SoftMax(tensor)); }
    ISliceLayer* addSlice(ITensor& tensor, Given start, Given size, Given stride) noexcept override
    {
        return keep(new Slice(tensor, start, size, stride));
    }
    IConvolutionLayer* addConvolutionNd(ITensor& t, Size maps, Given kernel, Weights w, Weights b) noexcept override
    {
        return keep(new Convolution(t, maps, kernel, w, b));
    }
    IConcatenationLayer* addConcatenation(ITensor* const* given, int32_t count) noexcept override
    {
        return keep(new Concatenation({given, given + count}));
    }
    IGatherLayer* addGather(ITensor& data, ITensor& indices, int32_t axis) noexcept override
    {
        return keep(new Gather(data, indices, axis));
    }
    IGatherLayer* addGatherV2(ITensor& data, ITensor& indices, GatherMode mode) noexcept override
    {
        if (mode != GatherMode::kDEFAULT)
            object("a gather by element");
        return keep(new Gather(data, indices, 0));
    }
    IMatrixMultiplyLayer* addMatrixMultiply(
        ITensor& a, MatrixOperation how_a, ITensor& b, MatrixOperation how_b) noexcept override
    {
        return keep(new MatrixMultiply(a, how_a, b, how_b));
    }
    IElementWiseLayer* addElementWise(ITensor& a, ITensor& b, ElementWiseOperation operation) noexcept override
    {
        return keep(new ElementWise(a, b, operation));
    }
    IUnaryLayer* addUnary(ITensor& tensor, UnaryOperation operation) noexcept override
    {
        if (is_integer(tensor.getType()))
            object("a function of integers");
        auto layer = plain<IUnaryLayer, mock::DVUnaryLayer>(LayerType::kUNARY, {&tensor});
        layer->tell("operation", {double(operation)});
        return layer;
    }
    IActivationLayer* addActivation(ITensor& tensor, ActivationType type) noexcept override
    {
        struct Activation final : Layer<IActivationLayer, mock::DVActivationLayer>
        {
            using Layer::Layer;
            void setAlpha(float alpha) noexcept override { tell("alpha", {alpha}); }
            void setBeta(float beta) noexcept override { tell("beta", {beta}); }
        };
        if (!is_float(tensor.getType()))
            object("an activation of integers");
        auto layer = keep(new Activation(LayerType::kACTIVATION, {&tensor}));
        layer->tell("type", {double(type)});
        return layer;
    }
    IReduceLayer* addReduce(ITensor& tensor, ReduceOperation operation, uint32_t axes, bool keeps) noexcept override
    {
        auto layer = plain<IReduceLayer, mock::DVReduceLayer>(LayerType::kREDUCE, {&tensor});
        std::vector<Size> sizes;
        for (int32_t i = 0; i < layer->in(0).nbDims; i++)
            if (!(axes >> i & 1) || keeps)
                sizes.push_back(axes >> i & 1 ? 1 : layer->in(0).d[i]);
        layer->output.dims = dims_of(sizes);
        layer->tell("operation", {double(operation)}), layer->tell("axes", {double(axes)});
        layer->tell("keeps", {double(keeps)});
        return layer;
    }
    IConstantLayer* addConstant(Given dims, Weights weights) noexcept override
    {
        auto layer = plain<IConstantLayer, mock::DVConstantLayer>(LayerType::kCONSTANT, {});
        layer->output.dims = dims, layer->output.type = weights.type, layer->weights["values"] = weights;
        if (!is_integer(weights.type) || dims.nbDims > 1 || weights.count > Dims::MAX_DIMS)
            return layer;
        auto short_values = static_cast<int32_t const*>(weights.values);
        auto long_values = static_cast<int64_t const*>(weights.values);
        if (weights.type == DataType::kINT32)
            layer->output.know({short_values, short_values + weights.count});
        else
            layer->output.know(std::vector<Size>(long_values, long_values + weights.count));
        return layer;
    }
    IIdentityLayer* addIdentity(ITensor& tensor) noexcept override
    {
        auto layer = plain<IIdentityLayer, mock::DVIdentityLayer>(LayerType::kIDENTITY, {&tensor});
        if (own(&tensor).has_values)
            layer->output.know(own(&tensor).values);
        return layer;
    }
    IShapeLayer* addShape(ITensor& tensor) noexcept override
    {
        auto layer = plain<IShapeLayer, mock::DVShapeLayer>(LayerType::kSHAPE, {&tensor});
        layer->output.dims = dims_of({layer->in(0).nbDims}), layer->output.type = SHAPES;
        layer->output.know(sizes_of(layer->in(0)));
        return layer;
    }
    ISelectLayer* addSelect(ITensor& condition, ITensor& yes, ITensor& no) noexcept override
    {
        if (condition.getType() != DataType::kBOOL || yes.getType() != no.getType())
            object("a choice by other than bool, or of two types");
        auto layer = plain<ISelectLayer, mock::DVSelectLayer>(LayerType::kSELECT, {&condition, &yes, &no});
        layer->output.type = yes.getType();
        layer->output.dims = broadcast(broadcast(layer->in(1), layer->in(2)), layer->in(0));
        return layer;
    }

#if NV_TENSORRT_MAJOR >= 10
    bool getFlag(NetworkDefinitionCreationFlag flag) const noexcept override
    {
        return flag == NetworkDefinitionCreationFlag::kSTRONGLY_TYPED;
    }
    ICastLayer* addCast(ITensor& tensor, DataType type) noexcept override
    {
        auto layer = plain<ICastLayer, mock::DVCastLayer>(LayerType::kCAST, {&tensor});
        layer->output.type = type;
        if (type == DataType::kUINT8 && tensor.getType() != DataType::kFLOAT && tensor.getType() != DataType::kHALF)
            object("bytes made from other than float32 or float16");
        if (own(&tensor).has_values)
            layer->output.know(own(&tensor).values);
        return layer;
    }
    ISqueezeLayer* addSqueeze(ITensor& tensor, ITensor& axes) noexcept override { return keep(new Squeeze(tensor, axes)); }
    IUnsqueezeLayer* addUnsqueeze(ITensor& tensor, ITensor& axes) noexcept override
    {
        return keep(new Unsqueeze(tensor, axes));
    }
    INormalizationLayer* addNormalization(ITensor& x, ITensor& scale, ITensor& bias, uint32_t axes) noexcept override
    {
        return keep(new Normalization(x, scale, bias, axes));
    }
#if HAS_ATTENTION
    INormalizationLayer* addNormalizationV2(ITensor& x, ITensor& scale, ITensor& bias, uint32_t axes) noexcept override
    {
        return keep(new Normalization(x, scale, bias, axes));
    }
    IAttention* addAttention(ITensor& q, ITensor& k, ITensor& v, AttentionNormalizationOp how, bool causal) noexcept override
    {
        auto attention = new Attention(q, k, v, how, causal);
        keep(&attention->layer);
        return attention;
    }
#endif
#endif
};

// ---- writing it down ----------------------------------------------------------------------------------------------

static std::string quoted(std::string const& plain)
{
    std::string out = "\"";
    for (char c : plain)
        out += c == '"' || c == '\\' ? std::string("\\") + c : c < ' ' ? std::string(" ") : std::string(1, c);
    return out + "\"";
}

template <class Range, class Write>
static std::string list(Range const& things, Write write, char open = '[', char close = ']')
{
    std::string out;
    for (auto const& thing : things)
        out += (out.empty() ? "" : ", ") + write(thing);
    return open + out + close;
}
static std::string number(double value)
{
    char out[32];
    std::snprintf(out, sizeof out, "%.9g", value);
    return out;
}
static std::string id(ITensor* tensor) { return tensor ? std::to_string(own(tensor).id) : "null"; }

static std::string described(Weights const& weights)
{
    int64_t start = weights_size, size = weights.count * int64_t(bytes_of(weights.type));
    weights_file.write(static_cast<char const*>(weights.values), size);
    weights_size += size;
    Numbers place = {double(weights.type), double(start), double(weights.count)};
    return list(place, [](double value) { return std::to_string(int64_t(value)); });
}
static std::string described(Tensor const* tensor)
{
    return "{\"id\": " + std::to_string(tensor->id) + ", \"name\": " + quoted(tensor->name)
        + ", \"type\": " + std::to_string(int(tensor->type))
        + ", \"shape\": " + list(sizes_of(tensor->dims), [](Size size) { return std::to_string(size); }) + "}";
}
static std::string described(AnyLayer const* layer)
{
    auto setting = [](auto const& entry) { return quoted(entry.first) + ": " + list(entry.second, number); };
    auto weights = [](auto const& entry) { return quoted(entry.first) + ": " + described(entry.second); };
    return "{\"name\": " + quoted(layer->name) + ", \"kind\": " + quoted(word(layer->kind))
        + ", \"inputs\": " + list(layer->inputs, id) + ", \"output\": " + described(&layer->output)
        + ", \"told\": " + list(layer->told, setting, '{', '}')
        + ", \"weights\": " + list(layer->weights, weights, '{', '}') + "}";
}

struct Logger final : ILogger
{
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity <= Severity::kERROR)
            std::cerr << message << "\n";
        else if (std::string(message).rfind("Parsing node: ", 0) == 0)
            parsing = message + 14;
    }
};

int main(int, char** arguments)
{
    Network network;
    Logger logger;
    nvonnxparser::IParser* parser = nvonnxparser::createParser(network, logger);
    bool parsed = parser && parser->parseFromFile(arguments[2], int(ILogger::Severity::kVERBOSE));
    for (int i = 0; parser && i < parser->getNbErrors(); i++)
        objections.push_back(std::string("parser: ") + parser->getError(i)->desc());
    weights_file.open(std::string(arguments[1]) + ".bin", std::ios::binary);
    auto tensor = [](Tensor const* one) { return described(one); };
    auto layer = [](AnyLayer const* one) { return "\n" + described(one); };
    std::ofstream(std::string(arguments[1]) + ".json")
        << "{\"parsed\": " << (parsed ? "true" : "false") << ", \"objections\": " << list(objections, quoted)
        << ", \"inputs\": " << list(network.inputs, tensor) << ", \"outputs\": " << list(network.outputs, tensor)
        << ", \"layers\": " << list(network.layers, layer) << "}\n";
    return parsed && objections.empty() ? 0 : 1;
}
